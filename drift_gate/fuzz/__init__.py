"""Random problems for every public function, held to the float64 reference: `drift-gate fuzz`.

choices      what a problem is: named choices, drawn by hypothesis or read from a file
shapes, values, options     tensors and options from choices, one subject a file
functions    the public functions: add one by one registration
evaluate     run a function on a backend, forward and backward
verdict      compare with the reference: budget, exact zeros, same bits, untouched inputs
run          the loop, the progress line, shrinking, saving and replaying
"""
