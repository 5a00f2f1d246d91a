"""A hub on loopback that speaks as much of the real one's protocol as its clients need, and misbehaves on demand."""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """`repos`: (kind, id, revision) -> {path: bytes}; `trouble`: id -> (what, how often, None for always)."""

    repos: dict = {}
    trouble: dict = {}
    seen: Counter = Counter()
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        api = path[0] == "api"
        if api:
            path.pop(0)
        kind = path.pop(0) if path[0] in ("datasets", "models") else "models"
        repo_id = "/".join(path[:2])
        action, rest = (path[2] if len(path) > 2 else "revision"), path[3:]
        Hub.seen[repo_id] += 1
        what, times = self.trouble.get(repo_id, (None, 0))
        if what and (times is None or Hub.seen[repo_id] <= times):
            return self.misbehave(what)
        revision = rest[0] if rest else "main"
        revision = next((known for _, _, known in self.repos if commit_of(known) == revision), revision)
        files = self.repos.get((kind, repo_id, revision))
        if files is None:
            known = any(repo_id == other for _, other, _ in self.repos)
            return self.reply(404, b"{}", X_Error_Code="RevisionNotFound" if known else "RepoNotFound")
        commit = commit_of(revision)
        if action == "resolve":
            return self.send_file(files, "/".join(rest[1:]), commit)
        if action == "revision":
            siblings = [{"rfilename": name} for name in files]
            answer = {
                "id": repo_id,
                "sha": commit,
                "siblings": siblings,
                "private": False,
                "gated": False,
                "tags": [],
                "downloads": 0,
            }
        elif action == "paths-info":
            wanted = [
                value.partition("=")[2]
                for value in unquote(body.decode()).split("&")
                if value.startswith("paths")
            ]
            wanted = wanted or json.loads(body or b"{}").get("paths", [])
            answer = [self.entry(name, files) for name in files if name in wanted]
        elif action == "tree":
            folder = "/".join(rest[1:])
            inside = {
                name: name.removeprefix(folder).strip("/")
                for name in files
                if not folder or name.startswith(folder + "/")
            }
            if not inside:
                return self.reply(404, b"{}", X_Error_Code="EntryNotFound")
            answer = [
                self.entry(name, files)
                for name, rest in inside.items()
                if "/" not in rest or "recursive=true" in self.path.lower()
            ]
            folders = {f"{folder}/{rest.split('/')[0]}".strip("/") for rest in inside.values() if "/" in rest}
            answer += [
                {"type": "directory", "path": name, "size": 0, "oid": commit_of(name)}
                for name in sorted(folders)
            ]
        else:
            return self.reply(404, b"{}", X_Error_Code="EntryNotFound")
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    do_GET = do_HEAD = do_POST = handle_any

    def entry(self, name, files):
        return {
            "type": "file",
            "path": name,
            "size": len(files[name]),
            "oid": hashlib.sha1(files[name]).hexdigest(),
        }

    def send_file(self, files, name, commit):
        if name not in files:
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        self.reply(200, files[name], ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def misbehave(self, what):
        if what == "gated":
            self.reply(
                401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted"
            )
        elif what == "forbidden":
            self.reply(
                403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="You are not in the authorized list"
            )
        elif what == "drop":
            self.close_connection = True
            self.connection.close()
        else:
            self.reply(int(what), b"{}")


@contextlib.contextmanager
def serve(repos, trouble):
    """The address of a hub with these repositories."""
    Hub.repos, Hub.trouble, Hub.seen = repos, trouble, Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
