"""Device profiles: every number has a unit and a source."""

from __future__ import annotations

import pytest

from edge_moe.errors import InputError
from edge_moe.profile import DeviceProfile
from edge_moe.profiles import device_names, load_device

GOOD = """
label = "Test card"
device = "cuda"
[memory_bytes]
value = "12 GiB"
source = "data sheet"
[memory_bytes_per_second]
value = "360 GB"
source = "data sheet"
"""


@pytest.mark.parametrize("name", device_names())
def test_shipped_profiles_are_complete(name: str) -> None:
    device = load_device(name)
    assert device.memory_bytes_per_second > 1e9
    assert {"memory_bytes", "memory_bytes_per_second"} <= device.sources.keys()
    assert all(device.sources.values())
    assert (device.host_link_bytes_per_second is None) == (device.device == "cpu")


def test_shipped_numbers() -> None:
    assert load_device("rtx-3060-12gb").memory_bytes == 12 * 2**30
    assert load_device("rtx-3060") == load_device("rtx-3060-12gb")
    assert load_device("rtx-4090-24gb").memory_bytes_per_second == 1_008_000_000_000
    assert load_device("h200").memory_bytes == 141_000_000_000


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="'abacus' is unknown; known devices: h200, laptop-16gb"):
        load_device("abacus")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 'red'" + GOOD, "unknown key 'colour'"),
        (GOOD + "colour = 'red'", "memory_bytes_per_second needs a value"),
        (GOOD.replace('value = "12 GiB"', ""), "memory_bytes needs a value"),
        (GOOD.replace('source = "data sheet"', "", 1), "memory_bytes needs a value"),
        (GOOD.replace("12 GiB", "12 parsecs"), "12 parsecs"),
        (GOOD.replace('"cuda"', '"abacus"'), "needs a label, and a device of"),
        (GOOD.split("[memory_bytes_per")[0], "memory_bytes_per_second is missing"),
        ("label = ", "is not TOML"),
    ],
)
def test_bad_files_are_refused(text: str, message: str) -> None:
    assert DeviceProfile.from_toml(GOOD).memory_bytes == 12 * 2**30
    with pytest.raises(InputError, match=message):
        DeviceProfile.from_toml(text)
