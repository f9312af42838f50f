"""What tests of applications, brokers and transports stand on."""
