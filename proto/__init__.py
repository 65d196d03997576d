"""The wire: .proto files and their committed stubs."""
