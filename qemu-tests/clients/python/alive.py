"""A process in the guest that shows whether memory and processes went on: it counts, and only its memory knows how far."""

import time

START = r"""
cat > /root/alive.sh <<'X'
i=0; while :; do i=$((i+1)); echo "$$ $i" > /run/alive.new; mv /run/alive.new /run/alive; sleep 0.1; done
X
setsid sh /root/alive.sh >/dev/null 2>&1 </dev/null &
until [ -s /run/alive ]; do sleep 0.05; done
"""
IDENTITY = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname"


def start(sandbox):
    """Starts it; answers what `look` does."""
    sandbox.exec(START, check=True)
    return look(sandbox)


def look(sandbox):
    """The process's id and how far it has counted. It has to be alive."""
    pid, count = sandbox.exec("read pid i < /run/alive; kill -0 $pid && echo $pid $i", check=True).stdout.split()
    return pid, int(count)


def goes_on(sandbox, since):
    """Asserts that the process of an earlier look is the same, and counts."""
    deadline = time.time() + 20
    while True:
        pid, count = look(sandbox)
        assert pid == since[0] and count >= since[1], ("another process, or an older one", since, (pid, count))
        if count > since[1] + 2:
            return pid, count
        assert time.time() < deadline, ("it stands still", since, (pid, count))
        time.sleep(0.2)


def status(client, sandbox):
    return client.sandboxes.get(sandbox.id).status
