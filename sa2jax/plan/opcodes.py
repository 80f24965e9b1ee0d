"""Opcodes of HLO by what they cost: nothing, a message between devices, a part of an operand."""

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "domain",
    "copy-done",
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
SLICES = {"slice", "dynamic-slice", "gather"}
UNARY = {"bitcast", "reshape", "copy", "convert", "transpose", "pad"}
NOTHING = {"AllocateBuffer", "ConcatBitcast"}  # custom calls that only name memory
STEPS = {"AsyncCollectiveStart", "AsyncCollectiveDone"}  # custom calls, see `Walker._find_chains`
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # -> the operand that holds the update
