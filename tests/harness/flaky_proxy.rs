//! Owns a TCP proxy between clients and a server whose connections meet a fate after some bytes:
//! silence in both directions without an end, or a reset. Knows bytes only.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing passes any more, in either direction; both sides stay connected to the proxy. What a
    /// lost network or a suspended machine looks like.
    Silence,
    /// Both sides are reset, in the middle of whatever they were saying.
    Reset,
}

/// A proxy on a free loopback port. Dropping it drops its connections.
#[derive(Debug)]
pub struct FlakyProxy {
    address: SocketAddr,
    struck: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl FlakyProxy {
    /// A proxy to `server`. `bytes_of` says for each connection, in the order of their coming,
    /// behind how many bytes from the server it meets its fate.
    ///
    /// # Panics
    /// When there is no port.
    pub async fn start(
        server: SocketAddr,
        fate: Fate,
        mut bytes_of: impl FnMut() -> usize + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let (strikes, struck) = watch::channel(0);
        let strikes = Arc::new(strikes);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (num_bytes, strikes) = (bytes_of(), Arc::clone(&strikes));
                connections.spawn(carry(client, server, (fate, num_bytes), strikes));
            }
        });
        Self { address, struck, task }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resolves when so many connections have met their fate.
    ///
    /// # Panics
    /// When they do not within `patience`.
    pub async fn until_struck(&self, num: usize, patience: Duration) {
        let mut struck = self.struck.clone();
        let waited = tokio::time::timeout(patience, struck.wait_for(|count| *count >= num)).await;
        assert!(waited.is_ok(), "{} of {num} connections met their fate", *self.struck.borrow());
    }
}

impl Drop for FlakyProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection from its beginning to its fate. One that ends before ends quietly.
async fn carry(
    mut client: TcpStream,
    server: SocketAddr,
    (fate, num_bytes): (Fate, usize),
    strikes: Arc<watch::Sender<usize>>,
) {
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let is_struck = {
        let (mut client_read, mut client_write) = client.split();
        let (mut server_read, mut server_write) = server.split();
        tokio::select! {
            () = forward(&mut client_read, &mut server_write) => false,
            is_struck = forward_some(&mut server_read, &mut client_write, num_bytes) => is_struck,
        }
    };
    if !is_struck {
        return;
    }
    match fate {
        Fate::Silence => {
            strikes.send_modify(|count| *count += 1);
            // Holds both sockets, so that neither side hears of an end.
            std::future::pending().await
        }
        Fate::Reset => {
            for socket in [&client, &server] {
                // A socket that is gone already needs no reset.
                let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
            }
            drop((client, server));
            strikes.send_modify(|count| *count += 1);
        }
    }
}

/// Carries bytes until one side ends.
async fn forward(from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>) {
    let _ = forward_some(from, to, usize::MAX).await;
}

/// Carries so many bytes at most. Returns whether there were more.
async fn forward_some(from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>, num_bytes: usize) -> bool {
    let mut left = num_bytes;
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        let passing = len.min(left);
        if to.write_all(&buffer[..passing]).await.is_err() {
            return false;
        }
        left -= passing;
        if passing < len {
            return true;
        }
    }
    false
}
