"""Streams that grow: folders that receive files, and Kafka topics."""
