"""The ramp begins one step late and never arrives at k.

Loses: 3a 3a* 3c*
"""


def ramp(k, T):
    return [1 + (k - 1) * t // T for t in range(T)]
