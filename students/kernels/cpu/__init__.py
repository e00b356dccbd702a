"""C sources of the operators on CPUs, and what compiles them."""
