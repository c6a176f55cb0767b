"""Importers of published dataset formats."""
