"""What sink_vllm changes in the processes that build the configuration and talk to clients.

A *stream* is what it is to the policy: the tokens of one request, prompt and output. A *stored
stream* is one that ``/v1/streams`` remembers between requests; in ``server.streams`` there is no
other kind. A *streamed response* is sent while it is made, over HTTP as *server-sent events*.
"""
