"""Reads requests from files, and writes result lines.

prompt_source.py, prompt_tables.py  read files of requests of every form as rows
prompt_rules.py, chat_messages.py, own_settings.py  check what a row says
prompts.py       checks the whole file first, then reads it again request by request
request.py       holds one prompt and its result
result_lines.py, result_stream.py  write finished requests
tokenizer.py     loads the tokenizer and the end-of-text tokens
"""
