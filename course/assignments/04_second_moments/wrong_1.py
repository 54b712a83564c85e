"""Divides by the number of inputs, not of tokens.

Loses: 4a*
"""


def second_moments(X):
    return X @ X.T / X.shape[0]
