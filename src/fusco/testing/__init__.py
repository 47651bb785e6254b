"""What tests the library: ranks on one machine, the dense reference, the conformance checks."""
