"""What every broker and every transport must do: suites that the tests of each implementation inherit."""
