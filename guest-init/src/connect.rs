//! One conversation with a Unix socket of the guest, as a command: what the host's exec sessions need to ask a service.
//!
//! Owns: bytes from standard input to the socket and from the socket to standard output, until the service closes it. The end
//! of the input is no end of the conversation: only a process that ends tells the service that nobody waits any more.
//! Refuses to know: what is said.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    process::ExitCode,
};

/// Nobody listens there: nothing was said. `EX_UNAVAILABLE` of sysexits.h.
pub const ABSENT: u8 = 69;
/// The conversation broke.
const BROKEN: u8 = 74;
const PIECE: usize = 64 << 10;

/// Runs `connect SOCKET`.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(path), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: connect SOCKET");
        return ExitCode::from(64);
    };
    let socket = match UnixStream::connect(&path) {
        Ok(socket) => socket,
        Err(error) => {
            eprintln!("{}: {error}", path.to_string_lossy());
            return ExitCode::from(ABSENT);
        }
    };
    match converse(socket, io::stdin(), io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", path.to_string_lossy());
            ExitCode::from(BROKEN)
        }
    }
}

/// Sends all of `input` from a thread of its own and writes what comes back until the other side is done.
pub fn converse(
    mut socket: UnixStream,
    mut input: impl Read + Send + 'static,
    mut output: impl Write,
) -> io::Result<()> {
    let mut to = socket.try_clone()?;
    // Its end is not waited for: the service may answer before it has read everything, and then nobody needs the rest.
    std::thread::spawn(move || io::copy(&mut input, &mut to));
    let mut piece = vec![0; PIECE];
    loop {
        match socket.read(&mut piece) {
            Ok(0) => return output.flush(),
            Ok(length) => output.write_all(&piece[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::net::UnixListener,
    };

    use super::*;

    #[test]
    fn a_request_goes_there_and_its_answer_comes_back_after_the_input_has_ended() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let service = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a connection");
            let mut line = String::new();
            BufReader::new(socket.try_clone().expect("a clone")).read_line(&mut line).expect("a line");
            // Whoever asked is still there, although it has nothing more to say.
            socket.set_nonblocking(true).expect("a socket");
            let still = socket.read(&mut [0; 1]).expect_err("neither data nor an end").kind();
            assert_eq!(still, io::ErrorKind::WouldBlock);
            socket.set_nonblocking(false).expect("a socket");
            socket.write_all(&line.to_uppercase().repeat(100_000).into_bytes()).expect("written");
        });
        let mut output = Vec::new();
        let socket = UnixStream::connect(&path).expect("a connection");

        converse(socket, &b"hello\n"[..], &mut output).expect("a conversation");

        service.join().expect("the service ended well");
        assert_eq!(output, b"HELLO\n".repeat(100_000));
    }

    #[test]
    fn an_absent_service_has_an_exit_code_of_its_own() {
        let nowhere = OsString::from("/nonexistent/socket");
        assert_eq!(format!("{:?}", main([nowhere].into_iter())), format!("{:?}", ExitCode::from(ABSENT)));
        assert_eq!(format!("{:?}", main(std::iter::empty())), format!("{:?}", ExitCode::from(64)));
    }
}
