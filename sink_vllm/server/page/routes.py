"""The page at ``/streams``: what a browser needs to look at ``/v1/streams``, and nothing else.

Three files of this folder, sent as they are. They hold nothing of the server's, so no key is asked
for; what the page shows it fetches from ``/v1/streams``, with the key that its user types.
"""

from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter(include_in_schema=False)

_HEADERS = {
    # Its own script and style, and its own server: nothing written into the page, nothing foreign.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_SCRIPTS = ("page.js", "api.js", "draw.js", "elements.js", "said.js", "streams.js")
_FILES = {
    "/streams": ("page.html", "text/html"),
    "/streams/page.css": ("page.css", "text/css"),
    **{f"/streams/{name}": (name, "text/javascript") for name in _SCRIPTS},
}


def _add(path: str, name: str, media_type: str) -> None:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")

    async def send() -> Response:
        return Response(text, media_type=media_type, headers=_HEADERS)

    router.add_api_route(path, send, methods=["GET"])


for _path, _file in _FILES.items():
    _add(_path, *_file)
