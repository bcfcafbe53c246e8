//! Files and listings over a connection: one visit to the file system after the other, each on a helper.

use std::io;

use pandastack_protocol::{CHUNK, Frame, Kind, Written};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    connection::{blocking, wrong},
    files,
    wire::Wire,
    write::Writer,
};

/// Bytes that one visit to the file system reads or writes.
const VISIT: usize = 4 * CHUNK;

/// Answers `ReadFile`.
pub async fn read_file<S: AsyncRead + AsyncWrite>(wire: &mut Wire<S>, path: String) -> io::Result<()> {
    let opened = blocking(move || {
        let path = files::checked(&path)?;
        files::open(&path).map(|(file, entry)| (file, entry, path))
    });
    let (mut file, entry, path) = match opened.await {
        Ok(opened) => opened,
        Err(failure) => return wire.answer::<()>(Err(failure)).await,
    };
    wire.outgoing.push_json(Kind::Ready, &entry)?;
    let mut path = path;
    loop {
        let visit = blocking(move || match files::read(&mut file, VISIT) {
            Ok(bytes) => Ok((bytes, file, path)),
            Err(error) => Err(files::failure(&path, &error)),
        });
        let bytes;
        (bytes, file, path) = match visit.await {
            Ok(visited) => visited,
            Err(failure) => return wire.answer::<()>(Err(failure)).await,
        };
        for chunk in bytes.chunks(CHUNK) {
            wire.outgoing.push(Kind::Data, chunk);
        }
        if bytes.len() < VISIT {
            return wire.answer(Ok(())).await;
        }
        wire.outgoing.flush().await?;
    }
}

/// Answers `WriteFile`.
pub async fn write_file<S>(wire: &mut Wire<S>, path: String, size: u64, mode: u32) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let created = blocking(move || Writer::create(&files::checked(&path)?, size, mode));
    let mut writer = match created.await {
        Ok(writer) => writer,
        Err(failure) => return wire.answer::<()>(Err(failure)).await,
    };
    wire.send(Kind::Ready, &()).await?;
    let mut gathered = Vec::new();
    loop {
        let Frame { kind, payload } = wire.incoming.next().await?;
        match kind {
            Kind::Data => gathered.extend_from_slice(&payload),
            Kind::DataEnd => {
                let end = blocking(move || {
                    writer.write(&gathered)?;
                    writer.finish()
                });
                let written = end.await.map(|bytes| Written { bytes });
                return wire.answer(written).await;
            }
            Kind::Stdin | Kind::StdinEnd | Kind::Ack | Kind::Signal | Kind::Resize => {}
            other => return wrong(wire, other).await,
        }
        if gathered.len() >= VISIT {
            let visit = blocking(move || {
                writer.write(&gathered)?;
                gathered.clear();
                Ok((writer, gathered))
            });
            (writer, gathered) = match visit.await {
                Ok(visited) => visited,
                Err(failure) => return wire.answer::<()>(Err(failure)).await,
            };
        }
    }
}

/// Answers `List`.
pub async fn list<S: AsyncRead + AsyncWrite>(wire: &mut Wire<S>, path: String) -> io::Result<()> {
    let opened = blocking(move || files::Listing::open(&files::checked(&path)?));
    let mut listing = match opened.await {
        Ok(listing) => listing,
        Err(failure) => return wire.answer::<()>(Err(failure)).await,
    };
    loop {
        let visit = blocking(move || Ok((listing.page(), listing)));
        let page;
        (page, listing) = match visit.await {
            Ok(visited) => visited,
            Err(failure) => return wire.answer::<()>(Err(failure)).await,
        };
        if page.is_empty() {
            return wire.answer(Ok(())).await;
        }
        wire.outgoing.push_json(Kind::Data, &page)?;
        wire.outgoing.flush().await?;
    }
}
