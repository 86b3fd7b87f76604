"""How fast the operators are, beside what else does the same work, on the machine at hand.

``lora-ext bench`` and the scripts in ``benchmarks/`` are thin over this package:

* `registry`: shapes of models; `workload`: which token uses which adapter; `grids`: lists of
  problems;
* `case`: what a problem is; `dense`, `embedding`, `moe`, `planning`: the problems;
* `providers`, `peft_layers`, `engines`: who does the work;
* `timing`, `floor`, `runner`, `report`: how it is timed, how fast it could be, and the table.

Nothing here prints or is imported by the library.
"""
