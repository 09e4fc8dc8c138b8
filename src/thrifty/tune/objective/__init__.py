"""Objectives: ``modules(model)`` names extra parts to train, ``loss(model, batch, step)`` a batch's share of the loss.

A step's loss is summed over its batches and processes, so an objective divides by ``batch.total``, not by what it
sees.
"""
