//! Owns a TCP proxy before a server that counts connections and can fall silent without closing
//! any, as a network does that loses everything. Knows no protocol.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The proxy. It ends with the runtime.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    num_connections: Arc<AtomicUsize>,
    is_silent: watch::Sender<bool>,
}

impl Proxy {
    /// A proxy on a free loopback port.
    ///
    /// # Panics
    /// When there is none.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound port has an address");
        let num_connections = Arc::new(AtomicUsize::new(0));
        let (is_silent, silence) = watch::channel(false);
        let count = Arc::clone(&num_connections);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let Ok(far) = TcpStream::connect(target).await else { continue };
                let ((from_near, to_near), (from_far, to_far)) =
                    (near.into_split(), far.into_split());
                tokio::spawn(pump(from_near, to_far, silence.clone()));
                tokio::spawn(pump(from_far, to_near, silence.clone()));
            }
        });
        Self { address, num_connections, is_silent }
    }

    /// Where to connect, as tonic wants it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Connections so far.
    #[must_use]
    pub fn num_connections(&self) -> usize {
        self.num_connections.load(Ordering::SeqCst)
    }

    /// From now on nothing passes, and nothing is closed.
    pub fn fall_silent(&self) {
        self.is_silent.send_replace(true);
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut silent: watch::Receiver<bool>) {
    let passing = async {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match from.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(len) if to.write_all(&buffer[..len]).await.is_err() => return,
                Ok(_) => {}
            }
        }
    };
    let is_silent = tokio::select! {
        biased;
        silenced = silent.wait_for(|silent| *silent) => silenced.is_ok(),
        () = passing => false,
    };
    if is_silent {
        // Both sockets stay open.
        let _held = (from, to);
        std::future::pending().await
    }
}
