"""The load sweep: every policy under every load, side by side in one service."""
