"""Traffic that changes its kind under a served speculator."""
