"""What tests share: oracles, tiny worlds, a browser, and what several test files say in the same words."""
