//! The host's stream, written in pieces that reach it whole.
//!
//! Linux from 6.17 on, and the stable kernels that took the change over, spread a vsock packet of more than 32 KiB over
//! several buffers. When the host takes only some of them, Firecracker 1.12 loses count and sends what was taken once
//! more (its issue 5475). A packet is never larger than the write that it came from, so small writes avoid it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that fit into one buffer of the kernel (32 KiB) beside its own bookkeeping.
const PIECE: usize = 31 << 10;

/// A stream whose writes are cut into pieces.
#[derive(Debug)]
pub struct Pieces<S>(pub S);

impl<S: AsyncRead + Unpin> AsyncRead for Pieces<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Pieces<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let piece = &bytes[..bytes.len().min(PIECE)];
        Pin::new(&mut self.0).poll_write(context, piece)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn no_write_is_larger_than_a_piece_and_all_of_it_arrives() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut pieces = Pieces(near);
        let sent: Vec<u8> = (0..3 * PIECE + 7).map(|at| (at % 251) as u8).collect();
        assert_eq!(pieces.write(&sent).await.unwrap(), PIECE);
        pieces.write_all(&sent[PIECE..]).await.unwrap();
        let mut arrived = vec![0; sent.len()];
        far.read_exact(&mut arrived).await.unwrap();
        assert_eq!(arrived, sent);
    }
}
