"""What calls cost on the host, in Python and in C++, before a GPU has anything to do."""
