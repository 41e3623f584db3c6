"""Made-up data, runs and measurements, and programs that the tests start."""
