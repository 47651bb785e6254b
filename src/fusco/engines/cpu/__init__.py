"""Shared-memory windows between the ranks of one host. Importing the package compiles nothing."""
