"""Small faults, planted one by one, that the tests must see: `make mutants`."""
