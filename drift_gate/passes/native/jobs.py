"""What functions in C are given: their structures, of members of eight bytes, packed into bytes.

`struct` packs twenty members in a tenth of the time that a `ctypes.Structure` takes to be made.
"""

import struct

ROWS = "Pqqqq"  # data, stride of a batch, of a row, T, kind

# As jobs.h has them.
SCAN = struct.Struct(f"@{ROWS} qd PPqq PPPPP PqP")
SELECT = struct.Struct(f"@{ROWS} qd Pq PPP")
EXPAND = struct.Struct(f"@{ROWS}{ROWS} qd PPqq PPPPPP")
DIVERGENCE = struct.Struct(f"@{ROWS}{ROWS} qqdddq PPq PPPP")
DIVERGENCE_GRAD = struct.Struct(f"@{ROWS}{ROWS}{ROWS} qqqdddq PPP")
VALID_ROWS = struct.Struct("@qqqq Pq Pq Pqq P")
FINISH = struct.Struct("@qqPPPPPqqPPPqd PPP PPPPPPPPP")  # and the rules follow
MEASURED_ROWS = struct.Struct("@qqPPPPPqqPPPqd Pq")  # and the gate's rule follows
GATE = struct.Struct("@qqqqqd")
POSITION = struct.Struct("@qqqqdddddd")
REDUCE = struct.Struct("@qqd")
SUPPORT = struct.Struct("@qqPqPP qq PPPPP")
TOPK = struct.Struct("@qq PPPPP PP qqd")
BY_WORD = struct.Struct("@qqPq PP")
WORD_SUMS = struct.Struct(f"@{ROWS}{ROWS} qq P PP")

SIZES = {
    "scan": SCAN.size,
    "select": SELECT.size,
    "expand": EXPAND.size,
    "divergence": DIVERGENCE.size,
    "divergence_grad": DIVERGENCE_GRAD.size,
    "valid_rows": VALID_ROWS.size,
    "finish": FINISH.size + GATE.size + POSITION.size + REDUCE.size,
    "measured_rows": MEASURED_ROWS.size + GATE.size,
    "support": SUPPORT.size,
    "topk": TOPK.size,
    "by_word": BY_WORD.size,
    "sum_words": WORD_SUMS.size,
}
