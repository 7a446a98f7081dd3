"""Calls of kubectl with time limits, whose errors say what to do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dml_dist.errors import ConfigError, RunError

# A server that does not answer is given up by kubectl itself, with a message that says so.
_REQUEST_SECONDS = 20
_SECONDS = 30


@dataclass(frozen=True)
class Kubectl:
    """The program kubectl, for one namespace.

    Attributes:
        namespace: Namespace of all requests.
        context: Context of kubectl's configuration; None is the current one.
    """

    namespace: str
    context: str | None = None

    def call(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl and return its output.

        Args:
            arguments: Command and options.
            text: Standard input.

        Raises:
            ConfigError: If there is no kubectl.
            RunError: If it fails or does not end within 30 s.
        """
        command = self._command(f"--request-timeout={_REQUEST_SECONDS}s", *arguments)
        try:
            done = subprocess.run(
                command, input=text or "", capture_output=True, text=True, timeout=_SECONDS
            )
        except FileNotFoundError:
            raise _missing() from None
        except subprocess.TimeoutExpired:
            raise RunError(
                f"`kubectl {arguments[0]}` did not end within {_SECONDS} s; check with "
                "`kubectl cluster-info` that the cluster answers"
            ) from None
        if done.returncode != 0:
            raise RunError(_failure(arguments, done.stderr))
        return done.stdout

    @contextmanager
    def lines(self, *arguments: str) -> Iterator[Iterator[str]]:
        """Run kubectl for as long as it gives lines, and end it with the context."""
        try:
            process = subprocess.Popen(
                self._command(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except FileNotFoundError:
            raise _missing() from None
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()
            process.stdout.close()
            process.wait()

    def _command(self, *arguments: str) -> list[str]:
        context = [] if self.context is None else ["--context", self.context]
        return ["kubectl", "--namespace", self.namespace, *context, *arguments]


def _missing() -> ConfigError:
    return ConfigError(
        "kubectl is not on the PATH, so that nothing can be sent to the Kubernetes cluster; "
        "install it, or write the manifest with --render and apply it on a machine that has it: "
        "kubectl apply -f FILE"
    )


def _failure(arguments: tuple[str, ...], output: str) -> str:
    """Return what kubectl said, and what to do about it."""
    # kubectl also logs each of its tries: a letter and the date begin such a line.
    lines = [line for line in output.splitlines() if not re.match(r"[EIW]\d{4} ", line)]
    said = "\n".join(lines).strip() or "without a message"
    what = f"`kubectl {arguments[0]}` failed: {said}"
    for sign, advice in _ADVICE.items():
        if sign in output:
            return f"{what}\n{advice}"
    return what


_ADVICE = {
    "no matches for kind": "The cluster has no KubeRay operator: install it, 1.5.1 or later.",
    "the server doesn't have a resource type": (
        "The cluster has no KubeRay operator: install it, 1.5.1 or later."
    ),
    "strict decoding error": (
        "The cluster's version of KubeRay does not know these fields: install a later one."
    ),
    "AlreadyExists": "Give the job another name with --id.",
    "namespaces": "Create the namespace, or give another as `namespace` of the target.",
    "(Forbidden)": "Ask the cluster's administrator for these rights, or give another `namespace`.",
    "Unauthorized": "Log in again with the tool that wrote kubectl's configuration.",
    "was refused": "Check kubectl's configuration and the target's `context`.",
    "no such host": "Check kubectl's configuration and the target's `context`.",
    "i/o timeout": "Check that this machine reaches the cluster, such as through its VPN.",
    "does not exist": "Check the target's `context` against `kubectl config get-contexts`.",
}
"""Part of kubectl's message -> what to do."""
