"""Asks a server of the OpenAI API about pictures, with the package `requests` alone; copy it.

python docs/ask_server.py page.png "What is the total?"
python docs/ask_server.py left.png right.png "Is the left one larger?" --url http://127.0.0.1:8000
"""

import argparse
import base64
import mimetypes
from pathlib import Path

import requests


def picture(path: str) -> dict:
    """A content part with the file's bytes."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help="files, in the order in which the question speaks of them")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server (http://127.0.0.1:8000)")
    args = parser.parse_args()
    request = {
        "model": "phi3v",
        "messages": [
            {"role": "user", "content": [*map(picture, args.pictures), {"type": "text", "text": args.question}]}
        ],
        "temperature": 0,
        "max_tokens": 64,
        "add_special_tokens": True,  # the BOS that the model was trained with, which the template leaves out
    }
    try:
        answer = requests.post(f"{args.url}/v1/chat/completions", json=request, timeout=600)
    except requests.ConnectionError:
        raise SystemExit(
            f"error: {args.url}: no server answers there; start it, or give its address by --url"
        ) from None
    if not answer.ok:
        raise SystemExit(f"error: {args.url} answers {answer.status_code}: {answer.text}")
    print(answer.json()["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
