"""The record of a run: ledger, spans, and what readers make of them."""
