"""One module per command: its flags, the call of the library function, what is printed."""
