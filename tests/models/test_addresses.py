"""Compiled code reaches arrays and other compiled code by their addresses."""

import numpy as np

from foretoken.core.jit import jit
from foretoken.models.addresses import address_of, call_at, code_of, doubles_at


@jit
def add(pair, target, number):
    for place in range(len(target)):
        target[place] += pair[0][place] + number


@jit
def add_twice(address, pair, target):
    call_at(address, (pair, target, 1))
    call_at(address, (pair, target, 1))


@jit
def total(address, length):
    return doubles_at(address, length).sum()


def test_a_function_is_called_by_its_address():
    pair, target = (np.arange(3.0), np.ones(2)), np.zeros(3)
    address = address_of(add, (pair, target, 1))
    assert address
    assert address == address_of(add, (pair, target, 5))  # of the same types
    add_twice(address, pair, target)
    assert target.tolist() == [2.0, 4.0, 6.0]
    code_of(add_twice, (address, pair, target))(address, pair, target)
    assert target.tolist() == [4.0, 8.0, 12.0]


def test_an_array_is_read_where_it_is():
    array = np.arange(5.0)
    assert total(array.ctypes.data, 5) == 10.0
    assert total(array[2:].ctypes.data, 2) == 5.0
