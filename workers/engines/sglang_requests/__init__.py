"""What an engine before an sglang needs, in this process or elsewhere: generations
as requests to it, its KV events, and sessions whose prefixes it is to keep."""
