//! One sandbox's namespace, from empty to attached.
//!
//! Owns: the order of the steps inside, and the sign by which a finished one is known again. Refuses to know: records,
//! other sandboxes, the host's rules.
//!
//! The sign is the alias of the link's inner end: it is set last, and it names the owner. Whatever is found without it is
//! the remains of an attempt that did not end, and is made anew.

use std::path::Path;

use crate::{
    error::{Error, Result},
    firewall,
    link::{End, Netlink},
    netns::Namespaces,
    plan::{self, Owner},
    tap,
};

/// Attaches the namespace that the calling thread is in; answers whether there was anything to do.
///
/// # Errors
/// A step was refused. The remains go with the next attempt, with [`detach`], or with the namespace.
pub async fn attach(spaces: &Namespaces, owner: &Owner, tap_group: Option<u32>, nft: &Path) -> Result<bool> {
    if is_attached(spaces, owner).await? {
        return Ok(false);
    }
    // Rules first: nothing made below ever passes a packet without them.
    firewall::load(nft, &plan::namespace_ruleset(owner.address)).await?;
    make_tap(&spaces.inner, tap_group).await?;
    make_link(spaces, owner).await?;
    Ok(true)
}

/// Removes the host's end of a sandbox's link, and so both; to be called in the host's namespace. Answers whether it
/// was there.
///
/// # Errors
/// The kernel refuses, or the interface of that name is not ours.
pub async fn detach(host: &Netlink, link: &str) -> Result<bool> {
    match host.find(link).await? {
        Some(found) if found.group == plan::GROUP => host.remove(found.index).await,
        Some(_) => Err(Error::LinkTaken(link.to_owned())),
        None => Ok(false),
    }
}

async fn is_attached(spaces: &Namespaces, owner: &Owner) -> Result<bool> {
    let Some(up) = spaces.inner.find(plan::UP).await? else { return Ok(false) };
    let Some(link) = spaces.host.find(&owner.link()).await? else { return Ok(false) };
    Ok(up.alias.as_deref() == Some(&sign(owner))
        && up.peer == Some(link.index)
        && link.peer == Some(up.index))
}

fn sign(owner: &Owner) -> String {
    format!("{} {}", owner.id, owner.address)
}

async fn make_tap(inner: &Netlink, group: Option<u32>) -> Result<()> {
    if inner.find(plan::TAP).await?.is_none() {
        tap::make(plan::TAP, tap::Kind::Tap, group)?;
    }
    let tap = inner.index(plan::TAP).await?;
    inner.shape(tap, plan::TAP_MAC, plan::MTU).await?;
    inner.forward_ipv4_only(tap).await?;
    inner.address(tap, plan::GATEWAY, plan::GUEST_PREFIX).await?;
    inner.up(tap).await?;
    inner.neighbour(tap, plan::GUEST, plan::GUEST_MAC).await
}

async fn make_link(spaces: &Namespaces, owner: &Owner) -> Result<()> {
    let Namespaces { inner, host, .. } = spaces;
    let name = owner.link();
    if let Some(remains) = inner.find(plan::UP).await? {
        inner.remove(remains.index).await?;
    }
    // The link of an earlier process of the same sandbox, whose namespace may still be going away.
    detach(host, &name).await?;
    let here = End { name: plan::UP, mac: owner.up_mac(), group: 0 };
    let there = End { name: &name, mac: owner.host_mac(), group: plan::GROUP };
    inner.add_pair(here, there, spaces.host_descriptor(), plan::MTU).await?;

    let link = host.index(&name).await?;
    host.forward_ipv4_only(link).await?;
    host.up(link).await?;
    host.route_to(link, owner.address, plan::HOST).await?;
    host.neighbour(link, owner.address, owner.up_mac()).await?;

    let up = inner.index(plan::UP).await?;
    inner.forward_ipv4_only(up).await?;
    inner.address(up, owner.address, 32).await?;
    inner.up(up).await?;
    inner.neighbour(up, plan::HOST, owner.host_mac()).await?;
    inner.default_route(up, plan::HOST).await?;
    host.running(&name).await?;
    inner.running(plan::UP).await?;
    inner.alias(up, &sign(owner)).await
}
