"""The fast form on a CPU in C++, compiled when it is first used."""
