"""Pure data and maths: no I/O, no clock, no models.

Shape letters, used in comments beside tensors everywhere:

    B requests in a step        R rows of the flat batch (all requests, all nodes)
    N nodes of one token tree   F frontier nodes of one drafting level
    V vocabulary                T cached positions
    H attention heads           D head dimension           L layers
"""
