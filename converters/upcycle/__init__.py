"""Dense checkpoint -> mixture of experts: reading the one, naming and writing the other."""
