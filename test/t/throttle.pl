# The migration holds for the sake of others, says why, and goes on.
#
# Everything here is decided by what can be read: rm_progress says why it waits,
# the state row's next_block does not move although the runner has looked again,
# and it goes on when the reason is gone.  The migration is run by a table's
# owner who is no superuser and may not see the statistics of others.

use strict;
use warnings;

use File::Spec;
use IPC::Run;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

# some windows of the backfill (1024 pages)
my $rows = 60_000;

my $node = LabNode->new('primary');
$node->init(allows_streaming => 'logical');
$node->append_conf(
	'postgresql.conf', q{
client_min_messages = warning
autovacuum = off
archive_mode = on
archive_command = 'true'
wal_keep_size = '1GB'
wal_receiver_status_interval = '100ms'
risky_migrations.lock_timeout = 100
});
$node->start;

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

sub sql
{
	my ($query) = @_;
	return $node->safe_psql('postgres', $query);
}

# as the table's owner
sub as_owner
{
	my ($query) = @_;
	return $node->safe_psql('postgres', $query, extra_params => [ '-U', 'rm_owner' ]);
}

sub start_call
{
	my (@statements) = @_;
	my %call = (out => '', err => '');
	$call{handle} = IPC::Run::start(
		[
			'psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-v', 'ON_ERROR_STOP=1',
			'-d', $node->connstr('postgres') . ' user=rm_owner', map { ('-c', $_) } @statements
		],
		'<', File::Spec->devnull, '>', \$call{out}, '2>', \$call{err},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return \%call;
}

sub ends_well
{
	my ($call, $name) = @_;
	ok($call->{handle}->finish, $name) or diag $call->{err};
	return;
}

sub fails
{
	my ($call, $pattern, $name) = @_;
	$call->{handle}->finish;
	like($call->{err}, $pattern, $name);
	return;
}

sub becomes
{
	my ($query, $name) = @_;
	return ok($node->poll_query_until('postgres', $query), $name);
}

my $open = q{(SELECT m FROM risky_migrations.migration m WHERE state = 'open')};

sub next_block
{
	return sql("SELECT ($open).next_block");
}

# Waits until the migration is shown as waiting for that.
sub holds
{
	my ($kind, $name) = @_;
	my $reason = '';
	my $until = time + $PostgreSQL::Test::Utils::timeout_default;
	# kind and reason by one query: a rest may be over before a second one
	while (time < $until)
	{
		$reason = as_owner("SELECT waiting_reason FROM rm_progress WHERE waiting_for = '$kind'");
		last if $reason ne '';
		usleep(100_000);
	}
	isnt($reason, '', "$name: the owner sees why it holds")
	  or diag sql('SELECT * FROM rm_progress');
	note $reason;
	# It looks once in a while, for which it takes a lock and a snapshot: one of
	# these looks may be under way, but not most of the time.
	foreach my $what (
		[ q{SELECT count(*) FROM pg_locks l JOIN rm_progress p USING (pid)
			WHERE l.locktype NOT IN ('virtualxid', 'advisory')}, 'it holds no lock' ],
		[ q{SELECT count(*) FROM pg_stat_activity a JOIN rm_progress p USING (pid)
			WHERE a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL}, 'and no snapshot' ])
	{
		my ($query, $is_so) = @$what;
		my @seen = sql($query);
		push @seen, map { sql($query) } 1 .. 8 if $seen[0] != 0;
		cmp_ok(2 * grep({ $_ != 0 } @seen), '<=', scalar(@seen), "$name: $is_so");
	}
	return $reason;
}

# The reason becomes another one by that: the runner has looked again, and the
# backfill stands where it stood.
sub still_holds
{
	my ($reason, $name, $change) = @_;
	my $block = next_block();
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		$change->();
		last if as_owner('SELECT waiting_reason FROM rm_progress') ne $reason;
	}
	isnt(as_owner('SELECT waiting_reason FROM rm_progress'), $reason, "$name: it looks again");
	is(next_block(), $block, "$name: and does not go on");
	return;
}

sub write_wal
{
	sql(q{SELECT count(pg_logical_emit_message(true, '', repeat('x', 100000))) FROM generate_series(1, 10)});
	return;
}

sub begin_migration
{
	as_owner(q{CALL rm_add_column('t', 'v', 'integer', 'v::integer')});
	return;
}

sub take_back
{
	as_owner('CALL rm_rollback()');
	return;
}

# every row has the value that it should have
sub all_right
{
	my ($server, $name) = @_;
	is( $server->safe_psql('postgres',
			'SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::integer) FROM t'),
		"$rows|0", "$name: every row is right");
	return;
}

# ---------------------------------------------------------------------------
# Setting
# ---------------------------------------------------------------------------

sql(q{
CREATE EXTENSION risky_migrations;
CREATE ROLE rm_owner LOGIN;
CREATE ROLE rm_stranger LOGIN;
GRANT CREATE ON SCHEMA public TO rm_owner;
});
as_owner(qq{
CREATE TABLE t (id integer PRIMARY KEY, v text NOT NULL, filler text);
INSERT INTO t SELECT i, i, repeat('x', 400) FROM generate_series(1, $rows) i;
CREATE TABLE switch (on_ boolean);
INSERT INTO switch VALUES (true);
CREATE FUNCTION asked() RETURNS boolean LANGUAGE plpgsql AS
	'BEGIN RAISE LOG \$\$throttle query\$\$; RETURN (SELECT on_ FROM switch); END';
});
$node->backup('base');
my $standby = LabNode->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby);

# ---------------------------------------------------------------------------
# A standby that does not keep up
# ---------------------------------------------------------------------------

foreach my $way (
	[ 'bytes', q{SET risky_migrations.max_replica_lag_bytes = '1MB'} ],
	# its 60 batches take 3 s at least, so it cannot be through before it is late
	[
		'time', q{SET risky_migrations.max_replica_lag_bytes = 0},
		q{SET risky_migrations.max_replica_lag = '1s'}, q{SET risky_migrations.batch_pause = '50ms'}
	])
{
	my ($what, @settings) = @$way;
	my $name = "replica lag in $what";

	begin_migration();
	$node->wait_for_catchup($standby);
	$standby->safe_psql('postgres', 'SELECT pg_wal_replay_pause()');
	my $call = start_call(@settings, 'CALL rm_backfill_batched(1000)');
	my $reason = holds('replica lag', $name);
	still_holds($reason, $name, \&write_wal);
	is(as_owner(q{SELECT count(*) FROM rm_progress WHERE waiting_since IS NOT NULL AND percent < 100}),
		1, "$name: with the time since when, in the middle of it");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM rm_progress', extra_params => [ '-U', 'rm_stranger' ]),
		0, "$name: a stranger does not see it");
	$standby->safe_psql('postgres', 'SELECT pg_wal_replay_resume()');
	ends_well($call, "$name: it goes on when the standby has caught up");
	all_right($node, $name);
	$node->wait_for_catchup($standby);
	all_right($standby, "$name, on the standby");
	is($standby->safe_psql('postgres', 'SELECT md5(string_agg(t::text, chr(10) ORDER BY id)) FROM t'),
		sql('SELECT md5(string_agg(t::text, chr(10) ORDER BY id)) FROM t'),
		"$name: both have the same rows");
	take_back();
}

# ---------------------------------------------------------------------------
# A logical subscriber that does not keep up
# ---------------------------------------------------------------------------

{
	my $subscriber = LabNode->new('subscriber');
	$subscriber->init;
	$subscriber->start;
	sql('CREATE TABLE published (id integer PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE published');
	$subscriber->safe_psql('postgres', 'CREATE TABLE published (id integer PRIMARY KEY)');
	# without an application_name, which the one that copies the table would bear too
	$subscriber->safe_psql('postgres', sprintf(
			q{CREATE SUBSCRIPTION sub CONNECTION '%s dbname=postgres' PUBLICATION pub}, $node->connstr));
	$subscriber->wait_for_subscription_sync($node, 'sub');

	# what it applies waits for a lock there
	my $lock = IPC::Run::start(
		[
			'psql', '-XAtq', '-d', $subscriber->connstr('postgres'),
			'-c', 'BEGIN; LOCK TABLE published; SELECT pg_sleep(600)'
		],
		'<', File::Spec->devnull, '>', File::Spec->devnull, '2>', File::Spec->devnull);
	my $locked = q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'};
	$subscriber->poll_query_until('postgres', $locked) or die 'no lock on the subscriber';
	begin_migration();
	sql('INSERT INTO published VALUES (1)');
	my $call = start_call(q{SET risky_migrations.max_replica_lag_bytes = '1MB'}, 'CALL rm_backfill_batched(1000)');
	my $reason = holds('replica lag', 'subscriber');
	my $walsender = sql(q{SELECT pid FROM pg_stat_replication WHERE application_name = 'sub'});
	still_holds($reason, 'subscriber', \&write_wal);
	like(as_owner('SELECT waiting_reason FROM rm_progress'), qr/walsender $walsender /, 'subscriber: it is the one that is named');
	$subscriber->safe_psql('postgres', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'});
	eval { $lock->finish };
	ends_well($call, 'subscriber: it goes on when it has caught up');
	all_right($node, 'subscriber');
	take_back();
	$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION sub');
	$subscriber->stop;
}

# ---------------------------------------------------------------------------
# A base backup is no standby
# ---------------------------------------------------------------------------

$standby->stop;
begin_migration();
{
	my $dir = PostgreSQL::Test::Utils::tempdir;
	my $backup = IPC::Run::start(
		[
			'pg_basebackup', '-D', "$dir/backup", '-X', 'stream', '-r', '32k', '-c', 'fast',
			'--no-sync', '-d', $node->connstr('postgres')
		],
		'<', File::Spec->devnull, '>', "$dir/out", '2>', "$dir/err");
	my $running = q{
SELECT array_agg(state ORDER BY state) = '{backup,streaming}' FROM pg_stat_replication};
	becomes($running, 'a slow base backup runs, with its stream of WAL')
	  or diag slurp_file("$dir/err") . sql('SELECT * FROM pg_stat_replication');
	ends_well(
		start_call(
			q{SET risky_migrations.max_replica_lag_bytes = '1kB'}, q{SET risky_migrations.max_replica_lag = 1},
			'CALL rm_backfill_batched()'),
		'base backup: it holds nobody');
	is(sql($running), 't', 'base backup: it still runs when the backfill is through');
	sql('SELECT pg_terminate_backend(pid) FROM pg_stat_replication');
	eval { $backup->finish };
	becomes('SELECT count(*) = 0 FROM pg_replication_slots', 'base backup: ended, with its slot');
}
take_back();
$standby->start;

# ---------------------------------------------------------------------------
# A slot that nobody reads from
# ---------------------------------------------------------------------------

sql(q{SELECT pg_create_physical_replication_slot('forgotten', true)});
begin_migration();
{
	my $call = start_call(q{SET risky_migrations.max_slot_retained_wal = '2MB'}, 'CALL rm_backfill_batched()');
	my $reason = holds('slot', 'slot');
	like($reason, qr/"forgotten" retains [\d.]+ MB of WAL, risky_migrations.max_slot_retained_wal is 2 MB/,
		'slot: with its name, the number and the limit');
	still_holds($reason, 'slot', \&write_wal);
	sql(q{SELECT pg_drop_replication_slot('forgotten')});
	ends_well($call, 'slot: it goes on when the slot is gone');
	all_right($node, 'slot');
}
take_back();

# ---------------------------------------------------------------------------
# An archive that takes nothing
# ---------------------------------------------------------------------------

$node->set_for_all(q{archive_command = 'false'});
becomes(q{SELECT failed_count > 0 FROM pg_stat_archiver, pg_switch_wal()}, 'archiving fails');
begin_migration();
{
	my $call = start_call(q{SET risky_migrations.max_unarchived_wal = '10MB'}, 'CALL rm_backfill_batched()');
	my $reason = holds('archive', 'archive');
	still_holds($reason, 'archive', sub { write_wal(); sql('SELECT pg_switch_wal()') });
	$node->set_for_all(q{archive_command = 'true'});
	ends_well($call, 'archive: it goes on when the archive takes WAL again');
	all_right($node, 'archive');
}
take_back();
$node->reset_all;

# ---------------------------------------------------------------------------
# The user's query
# ---------------------------------------------------------------------------

my $query = q{SET risky_migrations.throttle_query = 'SELECT asked()'};

sub times_asked
{
	my $log = slurp_file($node->logfile);
	my $times = () = $log =~ /LOG:  throttle query/g;
	return $times;
}

# it is asked twice more, which is looks at different times
sub asked_again
{
	my $before = times_asked();
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return 1 if times_asked() > $before + 1;
		sql('SELECT pg_sleep(0.1)');
	}
	return 0;
}

begin_migration();
{
	my $call = start_call($query, 'CALL rm_backfill_batched()');
	holds('query', 'query');
	my $block = next_block();
	ok(asked_again(), 'query: asked again and again');
	is(next_block(), $block, 'query: it does not go on');
	# cancelled while it holds
	sql('SELECT pg_cancel_backend(pid) FROM rm_progress');
	fails($call, qr/57014: canceling statement due to user request/, 'query: the hold can be cancelled');
	is( as_owner('SELECT last_step_state, sqlstate, next_call FROM rm_migrations ORDER BY id DESC LIMIT 1'),
		sprintf('failed|57014|CALL rm_backfill_batched(100000, %s)', sql("SELECT ($open).id")),
		'query: that is said, and what to call');

	# false, NULL and no row at all hold nobody
	foreach my $no ('SELECT false', 'SELECT NULL::boolean', 'SELECT true WHERE false', 'TABLE nothing')
	{
		as_owner('CREATE TABLE IF NOT EXISTS nothing (b boolean)');
		my $id = sql("SELECT ($open).id");
		as_owner("SET risky_migrations.throttle_query = '$no'; CALL rm_backfill_batched(1000, $id)");
		all_right($node, "query: $no");
		take_back();
		begin_migration();
	}

	# switched off, and the next step holds as well
	$call = start_call($query, 'CALL rm_backfill_batched()');
	holds('query', 'query, called again');
	as_owner('UPDATE switch SET on_ = false');
	ends_well($call, 'query: it goes on when it says no');
	all_right($node, 'query');

	as_owner('UPDATE switch SET on_ = true');
	$call = start_call($query, 'CALL rm_enforce_not_null()');
	holds('query', 'query, verification');
	is(as_owner('SELECT step FROM rm_progress'), 'enforce_not_null', 'query: of the next step');
	as_owner('UPDATE switch SET on_ = false');
	ends_well($call, 'query: the verification goes on as well');
}
take_back();

# what is wrong with it ends the step, which can be called again
begin_migration();
as_owner('CREATE FUNCTION writes() RETURNS boolean LANGUAGE sql AS $$DELETE FROM switch RETURNING true$$');
foreach my $case (
	[ 'SELECT 1/0 = 1', qr/22012: risky_migrations.throttle_query failed: division by zero/ ],
	[ 'SELECT 1', qr/42804: risky_migrations.throttle_query failed: its first column is not of type boolean/ ],
	[ 'SELECT', qr/42804: risky_migrations.throttle_query failed/ ],
	[ 'SELECT b FROM missing', qr/42P01: risky_migrations.throttle_query failed/ ],
	[ 'nonsense', qr/42601: risky_migrations.throttle_query failed/ ],
	[ 'COMMIT', qr/42601: risky_migrations.throttle_query failed: it is not one SELECT/ ],
	[ 'DELETE FROM switch', qr/0A000: risky_migrations.throttle_query failed/ ],
	[ 'SELECT writes()', qr/25006: risky_migrations.throttle_query failed/ ],
	[ 'SELECT true FROM pg_sleep(600)', qr/57014: risky_migrations.throttle_query did not end within 100 ms/ ])
{
	my ($text, $pattern) = @$case;
	my $call = start_call(
		q{SET risky_migrations.throttle_query_timeout = 100},
		"SET risky_migrations.throttle_query = '$text'",
		'CALL rm_backfill_batched()');
	fails($call, $pattern, "query: $text: the error says whose it is");
	like($call->{err}, qr/HINT:  Nothing of the step is lost/, "query: $text: and what to do");
	my ($sqlstate) = $call->{err} =~ /ERROR:  (\w{5}):/;
	is(as_owner('SELECT last_step_state, sqlstate FROM rm_migrations ORDER BY id DESC LIMIT 1'),
		"failed|$sqlstate", "query: $text: so does the state");
}
is(as_owner('SELECT count(*) FROM switch'), 1, 'query: nothing was written');

# what the database's owner has set for all is not run by just anybody
sql(q{
CREATE ROLE rm_database_owner LOGIN;
GRANT rm_owner TO rm_database_owner;
ALTER DATABASE postgres OWNER TO rm_database_owner;
LOAD 'risky_migrations';
ALTER DATABASE postgres SET risky_migrations.throttle_query = 'SELECT asked()';
});
my $before = times_asked();
my $refused = start_call('CALL rm_backfill_batched()');
fails($refused, qr/42501: risky_migrations.throttle_query failed: it was set by ALTER DATABASE/,
	'query: set by the owner of the database it is refused');
is(times_asked(), $before, 'query: and not run');
sql(q{ALTER DATABASE postgres OWNER TO CURRENT_USER});
as_owner('CALL rm_backfill_batched()');
cmp_ok(times_asked(), '>', $before, 'query: set by a superuser it is run');
sql(q{ALTER DATABASE postgres RESET ALL});
all_right($node, 'query, in the end');
take_back();

# ---------------------------------------------------------------------------
# The pause, and the reload of settings in the middle of a call
# ---------------------------------------------------------------------------

$node->set_for_all(q{risky_migrations.batch_pause = '1h'});
begin_migration();
{
	my @statements = ('SET client_min_messages = notice', 'CALL rm_backfill_batched(1000)');
	my $call = start_call(@statements);
	holds('pause', 'pause');
	is(sql("SELECT ($open).rows_done"), 1000, 'pause: after one batch');
	is(as_owner('SELECT rows_done FROM rm_progress'), 1000, 'pause: rm_progress says so too');

	# steered at once, though it would rest for an hour
	as_owner('SELECT rm_pause()');
	$call->{handle}->pump until $call->{err} =~ /migration \d+ is paused by role/;
	pass('pause: rm_pause is heard');
	as_owner('SELECT rm_resume()');
	becomes("SELECT ($open).rows_done = 2000", 'pause: and so is rm_resume');
	as_owner('SELECT rm_cancel()');
	fails($call, qr/ERROR:  57014: migration \d+ was cancelled by role/, 'pause: and rm_cancel');
	$call = start_call(@statements);
	becomes("SELECT ($open).rows_done = 3000", 'pause: called again, it goes on where it was');

	# by reload it becomes another reason, without a new call
	as_owner('UPDATE switch SET on_ = true');
	$node->set_for_all(q{risky_migrations.batch_pause = 0}, q{risky_migrations.throttle_query = 'SELECT on_ FROM public.switch'});
	holds('query', 'reload');
	$node->set_for_all(q{risky_migrations.throttle_query = ''});
	ends_well($call, 'reload: it goes on');
	all_right($node, 'pause');
}
take_back();
$node->reset_all;

# ---------------------------------------------------------------------------
# Rows that take long: no transaction keeps them for longer
# ---------------------------------------------------------------------------

as_owner(q{
CREATE TABLE slow AS SELECT i AS id, i::text AS v FROM generate_series(1, 60) i;
CREATE FUNCTION slowly(text) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM pg_sleep(0.02); RETURN $1::integer; END';
CALL rm_add_column('slow', 'v', 'integer', 'slowly(v)');
SET risky_migrations.max_row_lock_time = 50;
CALL rm_backfill_batched();
});
# the second row of a transaction after 20 ms, the third after 40: that is enough
cmp_ok(sql(q{SELECT max(transactions) FROM risky_migrations.step_log WHERE relation = 'public.slow' AND step = 'backfill'}),
	'>=', 20, 'row locks: slow rows are committed a few at a time');
take_back();

# With 40 of the 50 ms spent at the end of each transaction there is time for some
# five rows of 2 ms; without regard to that it would be twenty.
as_owner(q{
CREATE OR REPLACE FUNCTION slowly(text) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM pg_sleep(0.002); RETURN $1::integer; END';
INSERT INTO slow SELECT i, i FROM generate_series(61, 200) i;
CALL rm_add_column('slow', 'v', 'integer', 'slowly(v)');
});
sql(q{
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.04); RETURN new; END';
CREATE TRIGGER late BEFORE UPDATE ON risky_migrations.migration FOR EACH ROW EXECUTE FUNCTION late();
});
as_owner(q{SET risky_migrations.max_row_lock_time = 50; CALL rm_backfill_batched()});
sql(q{DROP TRIGGER late ON risky_migrations.migration});
cmp_ok(sql(q{SELECT transactions FROM risky_migrations.step_log WHERE relation = 'public.slow' AND step = 'backfill' ORDER BY id DESC LIMIT 1}),
	'>=', 25, 'row locks: slow commits are allowed for');
take_back();

# ---------------------------------------------------------------------------
# A lock: while it is asked for, and between two tries
# ---------------------------------------------------------------------------

foreach my $way (
	[ 'asked for', q{SET risky_migrations.lock_timeout = '60s'}, qr/^AccessExclusiveLock on t, held or asked for before by process \d+$/ ],
	[ 'between tries', q{SET risky_migrations.lock_timeout = '10ms'}, qr/^a lock on public.t was not to be had in \d+ tries \(process \d+ holds AccessShareLock\)/ ])
{
	my ($name, $setting, $pattern) = @$way;
	begin_migration();
	my $reader = start_call('BEGIN', 'SELECT count(*) FROM t', q{SELECT 'reads' FROM pg_sleep(600)});
	becomes(q{SELECT count(*) = 1 FROM pg_stat_activity WHERE query ~ '^SELECT .reads.' AND wait_event = 'PgSleep'}, "lock, $name: somebody reads");
	my $call = start_call($setting, 'SET risky_migrations.lock_retries = 10000', 'CALL rm_rollback()');
	my $reason = '';
	for (1 .. 100 * $PostgreSQL::Test::Utils::timeout_default)
	{
		$reason = as_owner(q{SELECT waiting_reason FROM rm_progress WHERE waiting_for = 'lock'});
		last if $reason =~ $pattern;
	}
	like($reason, $pattern, "lock, $name: it says who is in the way");
	sql(q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query ~ '^SELECT .reads.'});
	eval { $reader->{handle}->finish };
	ends_well($call, "lock, $name: it goes on");
}

# ---------------------------------------------------------------------------
# A vacuum against wraparound is neither fought nor queued behind
# ---------------------------------------------------------------------------

begin_migration();
as_owner(q{
ALTER TABLE t SET (autovacuum_freeze_max_age = 100000, autovacuum_vacuum_cost_delay = 100,
	autovacuum_vacuum_cost_limit = 1);
});
# a transaction id for each subtransaction that writes
sql(q{
CREATE TEMP TABLE burn (i integer);
DO $$
BEGIN
	FOR i IN 1 .. 110000 LOOP
		BEGIN
			INSERT INTO burn VALUES (i);
		EXCEPTION WHEN division_by_zero THEN NULL;
		END;
	END LOOP;
END $$});
$node->set_for_all(q{autovacuum = on}, q{autovacuum_naptime = '1s'});
my $vacuum = q{
SELECT a.pid FROM pg_stat_activity a JOIN pg_locks l USING (pid)
WHERE a.backend_type = 'autovacuum worker' AND a.query ~ 'public\.t \(to prevent wraparound\)'
	AND l.relation = 't'::regclass AND l.granted};
becomes("SELECT count(*) = 1 FROM ($vacuum) v", 'wraparound: a vacuum is at work');
my $pid = sql($vacuum);
my $from = -s $node->logfile;

as_owner('CALL rm_backfill_batched()');
is(sql($vacuum), $pid, 'wraparound: the backfill went on beside it');
all_right($node, 'wraparound');
foreach my $step ('CALL rm_enforce_not_null()', 'CALL rm_rollback()')
{
	# one try, which asking for the lock would use up
	my $call = start_call('SET risky_migrations.lock_retries = 0', $step);
	ok( $node->poll_query_until('postgres',
			q{SELECT coalesce((SELECT waiting_for = 'wraparound vacuum' FROM rm_progress), false)}),
		"wraparound, $step: it waits for the vacuum");
	my $reason = holds('wraparound vacuum', "wraparound, $step");
	like($reason, qr/process $pid\b/, "wraparound, $step: with its pid");
	is(sql(q{SELECT count(*) FROM pg_locks WHERE NOT granted}), 0, "wraparound, $step: nobody is asked for a lock");
	sql(q{SET lock_timeout = '1ms'; UPDATE t SET filler = filler WHERE id = 1});
	is(sql($vacuum), $pid, "wraparound, $step: the vacuum is left alone");
	if ($step =~ /rollback/)
	{
		$node->set_for_all(q{autovacuum = off});
		becomes(q{SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'autovacuum launcher'}, 'no more vacuums');
		sql("SELECT pg_terminate_backend($pid)");
		ends_well($call, "wraparound, $step: it goes on at its end");
	}
	else
	{
		sql('SELECT pg_cancel_backend(pid) FROM rm_progress');
		fails($call, qr/57014/, "wraparound, $step: the wait can be cancelled");
	}
}
unlike(slurp_file($node->logfile, $from), qr/canceling autovacuum task/, 'wraparound: nobody tried to make it give way');
$node->reset_all;

# ---------------------------------------------------------------------------
# The standby is promoted in the middle, and the backfill goes on there
# ---------------------------------------------------------------------------

begin_migration();
{
	my $call = start_call(q{SET risky_migrations.batch_pause = '1h'}, 'CALL rm_backfill_batched(20000)');
	holds('pause', 'promotion');
	my $state = q{SELECT m.next_block, m.rows_done FROM risky_migrations.migration m WHERE m.state = 'open'};
	my $then = sql($state);
	$node->wait_for_catchup($standby);
	$node->stop('immediate');
	eval { $call->{handle}->finish };
	$standby->promote;
	is($standby->safe_psql('postgres', $state), $then, "promotion: the state of the last batch is there ($then)");
	my $wrong = 'SELECT count(*) FROM t WHERE v_new IS DISTINCT FROM v::integer';
	cmp_ok($standby->safe_psql('postgres', $wrong), '>', 0, 'promotion: rows are still to be done');
	is($standby->safe_psql('postgres', 'SELECT count(*) FROM rm_progress'), 0, 'promotion: nothing runs there');
	my $next = $standby->safe_psql('postgres', q{SELECT next_call FROM rm_migrations WHERE state = 'open'});
	like($next, qr/^CALL rm_backfill_batched/, 'promotion: it says what to call');
	$standby->safe_psql('postgres', $next, extra_params => [ '-U', 'rm_owner' ]);
	all_right($standby, 'promotion');
	is( $standby->safe_psql('postgres', q{SELECT rows_changed FROM risky_migrations.step_log
			WHERE step = 'backfill' ORDER BY id DESC LIMIT 1}),
		$rows - (split /\|/, $then)[1], 'promotion: only what was left has been done');
	$standby->safe_psql('postgres', 'CALL rm_enforce_not_null()', extra_params => [ '-U', 'rm_owner' ]);
}

$standby->stop;
done_testing();
