"""Flax building blocks without model names. Legend of shape suffixes, for the whole project:

    B batch rows      L query length     T key length       I encoder length   S selected positions
    D model width     H heads            K head width       F feed-forward     V vocabulary          N layers
    M remembered positions               R relative distances

A suffix names the dimensions in order: `mask_B1LT` is [rows, 1, queries, keys]. Config keys are words (num_heads).
"""
