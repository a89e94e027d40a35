"""Adds `edge-moe` to `optimum-cli export`.

optimum looks for modules in this namespace, which is why neither this folder nor those above it
have an __init__.py. Nothing of edge-moe itself is imported before the command runs.
"""

from optimum.commands.export.base import ExportCommand

from edge_moe.commands.optimum_export import EdgeMoeExportCommand

REGISTER_COMMANDS = [(EdgeMoeExportCommand, ExportCommand)]
