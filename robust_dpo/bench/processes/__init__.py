"""The comparison on a CPU with a process for each implementation: no allocator, thread pool or compiler is shared."""
