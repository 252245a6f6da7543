"""The testing kit: fixtures, contract suites and fakes, importable by third parties."""
