"""A hub on loopback with as much of the real one's protocol as its clients need; it misbehaves on demand."""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """`repos`: (kind, id, revision) -> {path: bytes}. `trouble`: id -> (HTTP status or "drop", how often)."""

    protocol_version = "HTTP/1.1"

    def reply(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        """A path is [/api][/models or /datasets]/OWNER/NAME[/ACTION[/REVISION[/PATH]]]."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            parts.pop(0)
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        repo_id, action = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision"
        revision, path = parts[3] if len(parts) > 3 else "main", "/".join(parts[4:])
        self.requests[repo_id] += 1
        what, times = self.trouble.get(repo_id, (None, 0))
        if self.requests[repo_id] <= times:
            if what == "drop":
                self.close_connection = True
                return self.connection.close()
            return self.reply(what, b"{}", **({"X_Error_Code": "GatedRepo"} if what in (401, 403) else {}))
        revision = next((known for *_, known in self.repos if sha1(known.encode()) == revision), revision)
        files, commit = self.repos.get((kind, repo_id, revision)), sha1(revision.encode())
        if files is None:
            known = any(repo_id == other for _, other, _ in self.repos)
            return self.reply(404, b"{}", X_Error_Code="RevisionNotFound" if known else "RepoNotFound")
        if action == "resolve" and path in files:
            headers = dict(ETag=f'"{sha1(files[path])}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
            return self.reply(200, files[path], **headers)
        answer = self.answer(action, path, files, commit, body)
        if not answer:
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    do_GET = do_HEAD = do_POST = handle_any

    def answer(self, action, folder, files, commit, body):
        """What the API says; nothing for an unknown action or an empty folder."""
        if action == "revision":
            return {"id": commit, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        sizes = {name: {"size": len(content), "oid": sha1(content)} for name, content in files.items()}
        entries = {name: {"type": "file", "path": name, **size} for name, size in sizes.items()}
        if action == "paths-info":
            wanted = parse_qs(body).get("paths") or json.loads(body)["paths"]
            return [entry for name, entry in entries.items() if name in wanted]
        if action != "tree":
            return None
        prefix, recursive = folder + "/" if folder else "", "recursive=true" in self.path.lower()
        inside = {name.removeprefix(prefix): name for name in files if name.startswith(prefix)}
        found = [entries[name] for rest, name in inside.items() if recursive or "/" not in rest]
        folders = sorted({prefix + rest.split("/")[0] for rest in inside if "/" in rest})
        return found + [{"type": "directory", "path": name, "size": 0, "oid": commit} for name in folders]


@contextlib.contextmanager
def serve(repos, trouble):
    """The address of a hub with these repositories."""
    Hub.repos, Hub.trouble, Hub.requests = repos, trouble, Counter()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
