"""PEFT's files in and out, and the settings that go with them."""
