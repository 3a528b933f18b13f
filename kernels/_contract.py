"""What every kernel file agrees on.

One file is one operation: the formula, the plain torch reference, then (where one exists) the Triton body and its
launcher. The reference is the definition: tests compare everything else with it.

Tensors that are computed with end in their dimensions; the letters mean the same thing across the repository:

    T tokens in this step      I image tiles in this step          V vocabulary
    S sequences in this step   U patches per tile (CLS included)   B blocks in the KV pool
    D decoder width            E vision width                      P token slots per block
    F MLP width                M visual tokens per tile            N blocks per sequence (table width)
    H query heads   G key/value heads (G divides H)   C channels per head
    X visual tokens of several tiles, in prompt order              R rows whose logits are wanted
    K, N in a weight: inputs and outputs, stored [N, K] as the checkpoints do
"""
