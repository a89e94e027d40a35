"""`python -m edge_moe` is the `edge-moe` command."""

from edge_moe.start import main

if __name__ == "__main__":
    main()
