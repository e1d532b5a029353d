# SPDX-License-Identifier: Apache-2.0
"""A machine that executes PTX on the CPU and checks what kernels for GPUs do.

`text` takes PTX apart, `machine` runs a grid of it and returns findings and costs, `launches` runs what
Triton compiles, `small` is for tests of the machine itself. The machine is C++ (machine/). It executes one
instruction of one warp at a time, in an order chosen at random by a seed, with as many blocks at a time as
are said to be resident.

Order of accesses. An *agent* is a warp, or the copy engine of a block. Each has a *clock*, which advances
when it synchronises. Every two bytes of memory know the accesses that matter: the last write and the reads
since, each with its agent, its clock and its lane (or all lanes of a matrix instruction). An agent's *view*
says up to which clock it sees the accesses of every other; barriers, releases with acquires, fences with
relaxed accesses, mbarriers and waits join views, as far as their scope (block or GPU) reaches. An access
that conflicts with one that its view does not cover is a race, whatever the values were in this order of
execution; with one that has not ended yet (a copy in flight, a product that reads shared memory), it is too
early. Atomic accesses, and those with an order, do not race with each other if the scope of both includes
both. Writing the value that is there already is allowed, for lanes that store the same number.

*Proxies.* Bulk copies and warp-group products see ordinary writes only through fence.proxy.async: a view has
a second clock for each agent, up to which its writes are visible to these.

Findings are: race, too early, out of bounds, misaligned, never written (reaches a store, an address, a
condition or another instruction that depends on it), divergence, deadlock, mbarrier and wgmma (registers of
a product in flight).

Whatever the table of words in machine/program.cpp does not list is refused with its name (Unsupported):
clusters, local and constant memory, calls, bulk stores, rounding other than to nearest, saturation, 8-bit
and sparse products, tcgen05, and stores of single bytes, since memory is watched in units of two.

Not modelled: caches (a strong access reads what was written last), writes to the *source* of a copy in
flight, the visibility of mbarrier.init to the copy engine, state spaces of proxy fences (each counts for all
memory), barriers that wait for a warp which has ended (these let go), mbarriers as memory (their words read
as zero), contraction of mul and add by the assembler, and the order in which matrix units add (sums are
exact and rounded once). Waiting for one mbarrier also covers tiles that landed earlier for another; other
seeds let them land later. Of a warp whose lanes release one by one at different clocks, the latest release
counts: such code may see races that are none.
"""
