"""One revision for each SQL file of the contract."""
