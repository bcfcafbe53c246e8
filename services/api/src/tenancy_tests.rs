use super::*;
use crate::scope::Scope;

fn preset() -> Token {
    Token::parse("pds_0123456789abcdef0123456789abcdef").unwrap()
}

fn never(_: &Token) -> std::io::Result<()> {
    panic!("nothing is shown")
}

fn for_days(expires_in_days: u32) -> NewToken {
    NewToken { expires_in_days, ..NewToken::default() }
}

/// A last use may still be on its way to the disk when its tenancy is dropped.
async fn reopened(state: &Path) -> Tenancy {
    for _ in 0..100 {
        if let Ok(tenancy) = Tenancy::open(state) {
            return tenancy;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the records stay in use");
}

#[tokio::test]
async fn the_first_token_is_shown_once() {
    let state = tempfile::tempdir().unwrap();
    let shown = std::cell::RefCell::new(None);
    {
        let tenancy = Tenancy::open(state.path()).unwrap();
        tenancy.first_boot(None, |_| Err(std::io::Error::other("no console"))).await.unwrap();
        assert!(tenancy.tokens("").is_empty());
        tenancy
            .first_boot(None, |token| {
                *shown.borrow_mut() = Some(token.clone());
                Ok(())
            })
            .await
            .unwrap();
    }
    let tenancy = Tenancy::open(state.path()).unwrap();
    tenancy.first_boot(None, never).await.unwrap();
    let caller = tenancy.authenticate(&shown.take().unwrap(), now_ms()).unwrap();
    assert_eq!(caller.workspace, DEFAULT_WORKSPACE);
}

#[tokio::test]
async fn a_revoked_preset_stays_revoked_until_it_changes() {
    let state = tempfile::tempdir().unwrap();
    let tenancy = Tenancy::open(state.path()).unwrap();
    tenancy.first_boot(Some(preset()), never).await.unwrap();
    assert!(tenancy.authenticate(&preset(), now_ms()).is_some());

    assert!(tenancy.revoke(preset().prefix(), "").await.unwrap());
    drop(tenancy);
    let tenancy = reopened(state.path()).await;
    tenancy.first_boot(Some(preset()), never).await.unwrap();
    assert!(tenancy.authenticate(&preset(), now_ms()).is_none());

    let other = Token::random();
    tenancy.first_boot(Some(other.clone()), never).await.unwrap();
    assert!(tenancy.authenticate(&other, now_ms()).is_some());
}

#[tokio::test]
async fn tokens_expire_belong_and_remember_their_use() {
    let state = tempfile::tempdir().unwrap();
    let tenancy = Tenancy::open(state.path()).unwrap();
    assert!(tenancy.create_workspace("acme").await.unwrap());
    assert!(!tenancy.create_workspace("acme").await.unwrap());
    let (token, record) = tenancy.create_token("acme", for_days(1)).await.unwrap();

    let now = now_ms();
    assert_eq!(tenancy.authenticate(&token, now).unwrap().workspace, "acme");
    assert_eq!(tenancy.tokens("acme")[0].1.last_used_unix_ms, now);
    tenancy.authenticate(&token, now + 59_000).unwrap();
    assert_eq!(tenancy.tokens("acme")[0].1.last_used_unix_ms, now);
    assert!(tenancy.authenticate(&token, record.expires_unix_ms).is_none());
    assert!(!tenancy.revoke(token.prefix(), "default").await.unwrap());
    assert!(tenancy.delete_workspace("acme").await.unwrap());
    assert!(tenancy.authenticate(&token, now).is_none());
    assert!(Tenancy::open(tempfile::tempdir().unwrap().path()).unwrap().tokens("").is_empty());
}

#[tokio::test]
async fn a_token_never_outlives_the_one_that_made_it() {
    let state = tempfile::tempdir().unwrap();
    let tenancy = Tenancy::open(state.path()).unwrap();
    tenancy.create_workspace("acme").await.unwrap();
    let (short, record) = tenancy.create_token("acme", for_days(2)).await.unwrap();
    let caller = tenancy.authenticate(&short, now_ms()).unwrap();
    for (days, same) in [(0, true), (3, true), (1, false)] {
        let (_, minted) = tenancy.mint(&caller, for_days(days)).await.unwrap();
        assert!(minted.expires_unix_ms != 0 && minted.expires_unix_ms <= record.expires_unix_ms);
        assert_eq!(minted.expires_unix_ms == record.expires_unix_ms, same, "{days}");
    }
    let (endless, _) = tenancy.create_token("acme", for_days(0)).await.unwrap();
    let caller = tenancy.authenticate(&endless, now_ms()).unwrap();
    assert_eq!(tenancy.mint(&caller, for_days(0)).await.unwrap().1.expires_unix_ms, 0);
    tenancy.revoke(endless.prefix(), "").await.unwrap();
    assert!(tenancy.mint(&caller, for_days(0)).await.is_err());
}

#[test]
fn names_are_labels() {
    for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(41)].into_iter().chain(RESERVED) {
        assert!(check_name(bad).is_err(), "{bad:?}");
    }
    check_name("a-1").unwrap();
}

#[tokio::test]
async fn what_a_token_may_do_survives_and_grows_in_no_other() {
    let state = tempfile::tempdir().unwrap();
    let grant = Grant { scope: Scope::Read, sandbox: Some("s".into()) };
    let token = {
        let tenancy = Tenancy::open(state.path()).unwrap();
        tenancy.create_workspace("acme").await.unwrap();
        let wish = NewToken { grant: grant.clone(), ..NewToken::default() };
        tenancy.create_token("acme", wish).await.unwrap().0
    };
    let tenancy = reopened(state.path()).await;
    let caller = tenancy.authenticate(&token, now_ms()).unwrap();
    assert_eq!(caller.grant, grant);
    assert!(matches!(tenancy.mint(&caller, for_days(0)).await, Err(TenancyError::NotWhole)));
    // One that was made before there were grants may do everything.
    let old = r#"{"hash":"","workspace":"w","label":"","created_unix_ms":1,"expires_unix_ms":0,"last_used_unix_ms":0}"#;
    assert!(serde_json::from_str::<TokenRecord>(old).unwrap().grant.is_whole());
}

#[tokio::test]
async fn a_rate_is_durable_bounded_and_given_back() {
    let state = tempfile::tempdir().unwrap();
    let slow = Rate { per_second: 5, burst: 9, tool_calls: 0 };
    {
        let tenancy = Tenancy::open(state.path()).unwrap();
        tenancy.create_workspace("acme").await.unwrap();
        assert_eq!(tenancy.rate("acme"), RATE);
        tenancy.set_rate("acme", Some(slow)).await.unwrap();
        for bad in
            [Rate { per_second: 0, ..slow }, Rate { burst: 0, ..slow }, Rate { tool_calls: MOST + 1, ..slow }]
        {
            assert!(matches!(tenancy.set_rate("acme", Some(bad)).await, Err(TenancyError::BadRate)));
        }
        assert!(matches!(tenancy.set_rate("nobody", None).await, Err(TenancyError::NoWorkspace(_))));
    }
    let tenancy = reopened(state.path()).await;
    assert_eq!((tenancy.rate("acme"), tenancy.rate("other")), (slow, RATE));
    tenancy.set_rate("acme", None).await.unwrap();
    assert_eq!(tenancy.rate("acme"), RATE);
}

#[test]
fn an_organisations_id_is_a_uuid_of_its_own() {
    let made = |created_unix_ms| Workspace { created_unix_ms, rate: None };
    let id = made(1).org_id("acme");
    assert_eq!((id.len(), &id[14..15], id.matches('-').count()), (36, "8", 4));
    assert_eq!(id, made(1).org_id("acme"));
    assert!(id != made(2).org_id("acme") && id != made(1).org_id("other"));
}
