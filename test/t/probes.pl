# Probes: what rm_probe_start and rm_probe_stop promise.
#
# Each block proves one promise on a server of its own: the schedule and the
# latencies (also when the database stalls), whose rights a query has, that
# what is refused leaves nothing, every way in which a probe can end, and that
# it is never in the way of others.  What is exact, such as the distance between
# two ticks, is checked exactly; how long something takes only where the
# alternative is minutes, or by the clock of who made others wait.

use strict;
use warnings;

use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $node = LabNode->new('probes');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
max_worker_processes = 8
max_prepared_transactions = 5
log_min_messages = info
restart_after_crash = on
});
$node->start;
my $version = $node->safe_psql('postgres', 'SHOW server_version_num');

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

sub sql
{
	my ($query, $database) = @_;
	return $node->safe_psql($database // 'postgres', $query);
}

# The SQLSTATE of the error that the statement ends with, '' if there is none.
sub sqlstate_of
{
	my ($query, $database) = @_;
	my (undef, undef, $stderr) =
	  $node->psql($database // 'postgres', "\\set VERBOSITY verbose\n$query");
	return $stderr =~ /(?:ERROR|FATAL):  ([0-9A-Z]{5}):/ ? $1 : '';
}

# Starts a probe; the arguments after the query are SQL (every => "'5 ms'").
sub start_probe
{
	my ($query, %arguments) = @_;
	my $rest = join '', map { ", $_ => $arguments{$_}" } sort keys %arguments;
	return sql("SELECT rm_probe_start(\$probe\$$query\$probe\$$rest)");
}

sub stop_probe
{
	my ($id) = @_;
	return sql("SELECT rm_probe_stop($id)");
}

# Waits until the query gives the result; the arguments are those of is().
sub becomes
{
	my ($query, $expected, $name) = @_;
	ok($node->poll_query_until('postgres', $query, $expected), $name);
}

sub wait_for_samples
{
	my ($id, $count) = @_;
	$node->poll_query_until('postgres',
		"SELECT count(*) >= $count FROM rm_probe_results WHERE probe_id = $id")
	  or die "probe $id records nothing";
	return;
}

sub workers
{
	return sql(
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'"
	);
}

sub session
{
	return $node->background_psql('postgres', on_error_stop => 0);
}

# Locks the table t for so many seconds at least; returns the moments between
# which nobody can have got through.
sub stall
{
	my ($seconds) = @_;
	my ($from, undef, $to) = split /\n/, sql(qq{
BEGIN;
LOCK TABLE t;
SELECT clock_timestamp();
SELECT pg_sleep($seconds);
SELECT clock_timestamp();
COMMIT});
	return ("'$from'::timestamptz", "'$to'::timestamptz");
}

# The ticks of a probe follow each other at exactly this distance, none is
# missing and none is double.
sub schedule_is
{
	my ($id, $every, $name) = @_;
	is( sql(qq{
SELECT count(*) FROM (
	SELECT at - lag(at) OVER (ORDER BY at) AS step
	FROM rm_probe_results WHERE probe_id = $id) steps
WHERE step IS DISTINCT FROM interval '$every' AND step IS NOT NULL}),
		'0', $name);
}

# ---------------------------------------------------------------------------
# Setting
# ---------------------------------------------------------------------------

sql(q{
CREATE EXTENSION risky_migrations;
CREATE TABLE t (a integer PRIMARY KEY, b text);
INSERT INTO t SELECT g, g FROM generate_series(1, 1000) g;
CREATE TABLE seen (who text, session text, day text, path text);
GRANT ALL ON t, seen TO PUBLIC;
CREATE ROLE app LOGIN;
CREATE ROLE owner NOLOGIN;
CREATE ROLE stranger LOGIN;
GRANT owner TO app;
CREATE DATABASE other;
});

# ---------------------------------------------------------------------------
# Refusals come before any change
# ---------------------------------------------------------------------------

my @refused = (
	[ 'no query', '22004', 'SELECT rm_probe_start(NULL)' ],
	[ 'an empty query', '42601', q{SELECT rm_probe_start('')} ],
	[ 'only a comment', '42601', q{SELECT rm_probe_start(' -- nothing')} ],
	[ 'a syntax error', '42601', q{SELECT rm_probe_start('SELEC 1')} ],
	[ 'two statements', '42601', q{SELECT rm_probe_start('SELECT 1; SELECT 2')} ],
	[ 'transaction control', '0A000', q{SELECT rm_probe_start('COMMIT')} ],
	[ 'COPY to the client', '0A000', q{SELECT rm_probe_start('COPY t TO STDOUT')} ],
	[ 'every null', '22004', q{SELECT rm_probe_start('SELECT 1', every => NULL)} ],
	[ 'every 0', '22023', q{SELECT rm_probe_start('SELECT 1', every => '0')} ],
	[ 'every negative', '22023', q{SELECT rm_probe_start('SELECT 1', every => '-1 s')} ],
	[ 'every too short', '22023', q{SELECT rm_probe_start('SELECT 1', every => '999 us')} ],
	[ 'every too long', '22023', q{SELECT rm_probe_start('SELECT 1', every => '1:00:00.000001')} ],
	[ 'every in months', '22023', q{SELECT rm_probe_start('SELECT 1', every => '1 mon')} ],
	[ 'every of a million years in days', '22023', q{SELECT rm_probe_start('SELECT 1', every => '365000000 days')} ],
	[ 'timeout 0', '22023', q{SELECT rm_probe_start('SELECT 1', timeout => '0')} ],
	[ 'timeout too long', '22023', q{SELECT rm_probe_start('SELECT 1', timeout => '2 hours')} ],
	[ 'timeout null', '22004', q{SELECT rm_probe_start('SELECT 1', timeout => NULL)} ],
	[ 'time limit 0', '22023', q{SELECT rm_probe_start('SELECT 1', time_limit => '0')} ],
	[ 'time limit too long', '22023', q{SELECT rm_probe_start('SELECT 1', time_limit => '8 days')} ],
	[ 'a read-only transaction', '25006', q{BEGIN READ ONLY; SELECT rm_probe_start('SELECT 1')} ],
	[ 'stop: no id', '22004', 'SELECT rm_probe_stop(NULL)' ],
	[ 'stop: unknown id', '42704', 'SELECT rm_probe_stop(123456789)' ],
	[ 'stop: a snapshot that would not show the samples', '0A000',
		'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT rm_probe_stop(1)' ],
);

for my $case (@refused)
{
	my ($name, $sqlstate, $query) = @$case;
	is(sqlstate_of($query), $sqlstate, "refused: $name");
}
is(sql('SELECT count(*) FROM risky_migrations.probe'), '0',
	'what is refused leaves no row');
is(workers(), '0', 'what is refused leaves no worker');

my (undef, undef, $stderr) =
  $node->psql('postgres', q{SELECT rm_probe_start('SELECT 1 FROM')});
like($stderr, qr/^QUERY:  SELECT 1 FROM$/m,
	'a syntax error points into the query of the probe');

# ---------------------------------------------------------------------------
# An ordinary run
# ---------------------------------------------------------------------------

{
	my $id = start_probe('SELECT b FROM t WHERE a = 5');
	wait_for_samples($id, 50);
	is(sql("SELECT running, ended_at IS NULL FROM rm_probes WHERE id = $id"),
		't|t', 'a probe is shown as running');
	is( sql(q{SELECT query FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'}),
		'SELECT b FROM t WHERE a = 5',
		'pg_stat_activity shows the query');
	becomes(
		q{SELECT state || ' ' || wait_event FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'idle '
		  . ($version >= 170000 ? 'RiskyMigrationsProbe' : 'Extension'),
		'between ticks it is idle');

	becomes(q{SELECT idx_scan >= 50 FROM pg_stat_user_tables WHERE relname = 't'},
		't', 'what it reads shows in the statistics');

	my $count = stop_probe($id);
	is( $count,
		sql("SELECT count(*) FROM rm_probe_results WHERE probe_id = $id"),
		'rm_probe_stop returns the number of samples');
	is( sql(qq{
SELECT running, end_reason, ended_at > started_at FROM rm_probes WHERE id = $id}),
		'f|stopped|t', 'a stopped probe is shown as ended');
	is( sql(qq{
SELECT string_agg(DISTINCT outcome, ','), count(sqlstate), count(message),
	min(latency_ms) > 0, min(latency_ms) < 10,
	bool_and(at + latency_ms * interval '1 ms' < clock_timestamp())
FROM rm_probe_results WHERE probe_id = $id}),
		'ok|0|0|t|t|t', 'all is well, and the time between the ticks does not count');
	schedule_is($id, '10 ms', 'a tick every 10 ms');
	is( sql(qq{
SELECT abs(count(*) - extract(epoch FROM max(at) - min(at)) * 100 - 1) < 0.001
FROM rm_probe_results WHERE probe_id = $id}), 't', 'and 100 of them a second');
	is(workers(), '0', 'its worker is gone when rm_probe_stop returns');
	is(stop_probe($id), $count, 'stopping it again returns the same');
}

# ---------------------------------------------------------------------------
# A stall is seen by all who would have come meanwhile
# ---------------------------------------------------------------------------

{
	my @ids = map { start_probe($_) } (
		'SELECT b FROM t WHERE a = 5',
		'UPDATE t SET b = b WHERE a = 7',
		'SELECT 1');
	becomes('SELECT count(DISTINCT pid) FROM pg_stat_activity WHERE backend_type = \'risky_migrations probe\'',
		'3', 'several probes run at once');
	wait_for_samples($_, 20) for @ids;

	my ($from, $to) = stall(2);

	# stopped at once: what was due during the stall must not get lost
	stop_probe($_) for @ids;
	for my $i (0, 1)
	{
		schedule_is($ids[$i], '10 ms', 'no tick is missing after a stall');
		is( sql(qq{
SELECT count(*) FILTER (WHERE at >= $from AND at < $to)
		BETWEEN floor(extract(epoch FROM $to - $from) * 100) AND ceil(extract(epoch FROM $to - $from) * 100),
	bool_and(at + latency_ms * interval '1 ms' > $to) FILTER (WHERE at >= $from AND at < $to),
	bool_and(at + latency_ms * interval '1 ms' < clock_timestamp()),
	bool_and(outcome = 'ok')
FROM rm_probe_results WHERE probe_id = $ids[$i]}),
			't|t|t|t', 'a stall of 2 s: all who would have come in it are there, and waited for its end');
		is( sql(qq{
SELECT count(*) > 50, bool_and(later < latency_ms) FROM (
	SELECT latency_ms, lead(latency_ms, 20) OVER (ORDER BY at) AS later
	FROM rm_probe_results WHERE probe_id = $ids[$i]) s
WHERE latency_ms > 1000}),
			't|t', 'who came 200 ms later waited less');
	}
	is( sql("SELECT max(latency_ms) < 1900 FROM rm_probe_results WHERE probe_id = $ids[2]"),
		't', 'who did not touch the table did not wait');
}

# ---------------------------------------------------------------------------
# Timeouts and errors are outcomes
# ---------------------------------------------------------------------------

{
	my $id = start_probe('SELECT b FROM t WHERE a = 5', timeout => "'300 ms'");
	wait_for_samples($id, 10);
	my ($from, $to) = stall(1);
	wait_for_samples($id, 150);
	stop_probe($id);
	schedule_is($id, '10 ms', 'no tick is missing after timeouts');
	is( sql(qq{
SELECT count(*) >= 40, min(latency_ms) >= 300, string_agg(DISTINCT sqlstate, ',')
FROM rm_probe_results WHERE probe_id = $id AND outcome = 'timeout'}),
		't|t|57014', 'a query that takes longer than the timeout is cancelled');
	is( sql(qq{
SELECT count(*) > 20, count(*) FILTER (WHERE at >= $from AND at < $to - interval '500 ms'),
	string_agg(DISTINCT outcome, ',')
FROM rm_probe_results WHERE probe_id = $id AND outcome <> 'timeout'}),
		't|0|ok', 'what is in time is ok, and nothing else');
}

{
	my $id = start_probe('SELECT 1 / (random() * 0)::integer');
	my $long = start_probe(q{DO $$ BEGIN RAISE 'x%', repeat('é', 400) USING errcode = 'RM001'; END $$});
	wait_for_samples($_, 20) for ($id, $long);
	sql(q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity, generate_series(1, 50) WHERE backend_type = 'risky_migrations probe'}) for 1 .. 5;
	my $before = sql("SELECT count(*) FROM rm_probe_results WHERE probe_id = $id");
	wait_for_samples($_, $before + 50) for ($id, $long);
	is( sql("SELECT bool_and(running) FROM rm_probes WHERE id IN ($id, $long)"),
		't', 'a cancel request does not end a probe, and errors do not either');
	stop_probe($_) for ($id, $long);
	is( sql(qq{
SELECT DISTINCT outcome, sqlstate, message FROM rm_probe_results
WHERE probe_id = $id AND sqlstate <> '57014'}),
		'error|22012|division by zero', 'an error is recorded as such');
	is( sql(qq{
SELECT DISTINCT octet_length(message), right(message, 1) FROM rm_probe_results
WHERE probe_id = $long AND sqlstate = 'RM001'}),
		'499|é', 'a message is kept up to 500 bytes, and cut between characters');
	unlike(slurp_file($node->logfile), qr/division by zero/,
		'the errors of a probe are not in the log');
}

# ---------------------------------------------------------------------------
# As the caller: role, rights and settings
# ---------------------------------------------------------------------------

my $who = q{INSERT INTO public.seen SELECT current_user, session_user, '2026-02-01'::date::text, current_setting('search_path')};

# Who ran the query when it was started by these statements?
sub seen_by
{
	my ($statements) = @_;
	sql('TRUNCATE seen');
	my ($id) = (sql("$statements; SELECT public.rm_probe_start(\$p\$$who\$p\$)") =~ /(\d+)\s*$/);
	wait_for_samples($id, 5);
	stop_probe($id);
	return sql(q{SELECT string_agg(DISTINCT who || ' ' || session || ' ' || day || ' ' || path, ',') FROM seen});
}

my $superuser = sql('SELECT current_user');
is( seen_by(q{SET search_path = pg_catalog, "Odd, name"; SET datestyle = german}),
	qq{$superuser $superuser 01.02.2026 pg_catalog, "Odd, name"},
	'a query has the settings of the session that started it');
is( seen_by('SET SESSION AUTHORIZATION app'),
	'app app 2026-02-01 "$user", public', 'a query runs as the session user');
is( seen_by('SET SESSION AUTHORIZATION app; SET ROLE owner'),
	'owner app 2026-02-01 "$user", public',
	'a query runs as the role that was set, also if it is NOLOGIN');

if ($version >= 170000)
{
	is( seen_by('SET SESSION AUTHORIZATION owner'),
		'owner owner 2026-02-01 "$user", public',
		'also a session user without LOGIN can have a probe');
}
else
{
	is(sqlstate_of(q{SET SESSION AUTHORIZATION owner; SELECT rm_probe_start('SELECT 1')}),
		'42501', 'a session user without LOGIN is refused before 17');
}

{
	# in a session of app: a superuser may all
	my $id = sql(q{SET SESSION AUTHORIZATION app; SELECT rm_probe_start('SELECT 1')});
	wait_for_samples($id, 1);
	is(sqlstate_of("SET SESSION AUTHORIZATION stranger; SELECT rm_probe_stop($id)"),
		'42501', 'nobody stops the probe of another role');
	is(sql("SELECT running FROM rm_probes WHERE id = $id"), 't', 'and it goes on');
	is(sql("SET SESSION AUTHORIZATION stranger; SELECT count(*) FROM rm_probe_results"),
		'0', 'nor does anybody see its samples');
	isnt(sql("SET SESSION AUTHORIZATION app; SELECT rm_probe_stop($id)"), '0',
		'its owner does');

	# a definer's function must not reach the rights of its caller
	sql(q{
SET SESSION AUTHORIZATION stranger;
CREATE SCHEMA trap AUTHORIZATION stranger;
CREATE FUNCTION trap.f() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS
$$ SELECT rm_probe_start('DO $do$ BEGIN RESET ROLE; INSERT INTO public.seen VALUES (current_user); END $do$') $$;
}) if sql('CREATE SCHEMA trap AUTHORIZATION stranger; DROP SCHEMA trap; GRANT CREATE ON DATABASE postgres TO stranger; SELECT 1');
	sql('TRUNCATE seen');
	$id = sql('SELECT trap.f()');
	wait_for_samples($id, 3);
	stop_probe($id);
	is(sql('SELECT count(*) FROM seen'), '0', 'a probe cannot leave the role that it was started as');
	is( sql("SELECT DISTINCT outcome, sqlstate FROM rm_probe_results WHERE probe_id = $id"),
		'error|42501', 'and is told so');

	# what a commit fires runs as that role too
	sql(q{
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NULL; END $$;
CREATE TABLE u (a integer);
GRANT ALL ON u TO PUBLIC;
CREATE CONSTRAINT TRIGGER note AFTER INSERT ON u
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note();
TRUNCATE seen});
	$id = sql(q{SET SESSION AUTHORIZATION app; SET ROLE owner; SELECT rm_probe_start('INSERT INTO u VALUES (1)')});
	wait_for_samples($id, 3);
	stop_probe($id);
	is(sql('SELECT DISTINCT who FROM seen'), 'owner', 'also at the commit it is the role of the query');
}

# ---------------------------------------------------------------------------
# Transactions of the starter
# ---------------------------------------------------------------------------

{
	my $start = q{SELECT rm_probe_start('INSERT INTO seen VALUES (''x'')')};
	my $rows = sql('SELECT count(*) FROM risky_migrations.probe');
	sql('TRUNCATE seen');

	my $session = session();
	$session->query_safe('BEGIN');
	my $id = $session->query_safe($start);
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'1', 'its worker is there before the commit');
	usleep(300_000);
	is(sql('SELECT count(*) FROM seen'), '0', 'a probe does not begin before the commit');
	$session->query_safe('ROLLBACK');
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'0', 'after a rollback its worker goes away');
	is(sql('SELECT count(*) FROM risky_migrations.probe'), $rows, 'and there is no row');

	$session->query_safe('BEGIN; SAVEPOINT s');
	$session->query_safe($start);
	$session->query_safe('ROLLBACK TO s; COMMIT');
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'0', 'also after the rollback of a subtransaction');
	is(sql('SELECT count(*) FROM seen'), '0', 'neither has run');

	for my $pause (0, 300_000)
	{
		$session->query_safe('BEGIN');
		$id = $session->query_safe($start);
		usleep($pause);
		is( $session->query_safe(
				"SELECT rm_probe_stop($id), clock_timestamp() - statement_timestamp() < '9 s'"),
			'0|t', 'started and stopped in one transaction: at once');
		$session->query_safe('COMMIT');
		becomes("SELECT end_reason, running FROM rm_probes WHERE id = $id",
			'stopped|f', 'and the row says so');
	}
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'0', 'its worker goes away');
	is(sql('SELECT count(*) FROM seen'), '0', 'and has not run');

	$session->query_safe('BEGIN');
	$id = $session->query_safe($start);
	$session->query_safe(q{PREPARE TRANSACTION 'p'});
	usleep(100_000);
	is(sql('SELECT count(*) FROM seen'), '0', 'a prepared transaction is not the end');
	$session->query_safe(q{COMMIT PREPARED 'p'});
	wait_for_samples($id, 1);
	stop_probe($id);
	pass('its commit is');
	$session->quit;
}

# ---------------------------------------------------------------------------
# Stopping in the middle of a stall
# ---------------------------------------------------------------------------

{
	my $session = session();
	my $id = start_probe('SELECT b FROM t WHERE a = 5');
	wait_for_samples($id, 5);
	$session->query_safe('BEGIN; LOCK TABLE t');
	usleep(500_000);
	is( $session->query_safe(
			"SELECT rm_probe_stop($id) > 0, clock_timestamp() - statement_timestamp() < '9 s'"),
		't|t', 'a probe that waits for a lock of the caller can be stopped');
	$session->query_safe('ROLLBACK');
	$session->quit;

	# the caller has rolled back; the row was ended by the worker itself
	is(sql("SELECT end_reason, running FROM rm_probes WHERE id = $id"),
		'stopped|f', 'and has ended, whatever becomes of the transaction');
	schedule_is($id, '10 ms', 'those who waited are on record');
	is( sql(qq{
SELECT max(latency_ms) >= 450, count(*) FILTER (WHERE outcome = 'timeout') >= 40, count(*) FILTER (WHERE outcome = 'error')
FROM rm_probe_results WHERE probe_id = $id}),
		't|t|0', 'as having waited at least so long');
}

# ---------------------------------------------------------------------------
# No worker to be had
# ---------------------------------------------------------------------------

{
	my $rows = sql('SELECT count(*) FROM risky_migrations.probe');
	my @ids;

	while (sqlstate_of(q{SELECT rm_probe_start('SELECT 1', every => '10 minutes')}) ne '53000')
	{
		last if @ids > 20;
		push @ids, sql('SELECT max(id) FROM rm_probes');
	}
	cmp_ok(scalar @ids, '<=', 8, 'when all workers are in use that is an error');
	cmp_ok(scalar @ids, '>=', 4, 'but not before');
	is(sql('SELECT count(*) FROM risky_migrations.probe'),
		$rows + @ids, 'it leaves no row');
	for (1 .. 5)
	{
		stop_probe(shift @ids);
		push @ids, start_probe('SELECT 1', every => "'10 minutes'");
	}
	pass('a worker is free as soon as rm_probe_stop returns');

	# rm_probe_stop() itself would give up long before the next tick
	stop_probe($_) for @ids;
	pass('a probe that sleeps is stopped at once');
}

# ---------------------------------------------------------------------------
# Other ways to end
# ---------------------------------------------------------------------------

{
	my $id = start_probe('SELECT 1', time_limit => "'500 ms'");
	becomes("SELECT end_reason FROM rm_probes WHERE id = $id AND NOT running",
		'time limit', 'a probe ends at its time limit');
	is(stop_probe($id), '50', 'after exactly as many ticks as fit');
}

{
	my $id = start_probe('SELECT b FROM t WHERE a = 5');
	wait_for_samples($id, 10);
	my $session = session();
	$session->query_safe('BEGIN; LOCK TABLE t');
	usleep(200_000);
	sql(q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'});
	is(sql("SELECT end_reason, running FROM rm_probes WHERE id = $id"),
		'terminated|f', 'a probe that is terminated while it waits for a lock');
	schedule_is($id, '10 ms', 'has stored its samples');
	$session->query_safe('ROLLBACK');
	$session->quit;
}

{
	my $id = start_probe('SELECT 1', every => "'10 minutes'");
	wait_for_samples($id, 1);
	sql("DELETE FROM risky_migrations.probe WHERE id = $id");
	my $begin = time;
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'0', 'a probe ends when its row is deleted');
	cmp_ok(time - $begin, '<', 300, 'although the next tick is far away');
}

{
	my $id = start_probe('SELECT pg_advisory_unlock_all()');
	wait_for_samples($id, 20);
	is(sql("SELECT running FROM rm_probes WHERE id = $id"),
		't', 'a query that releases all advisory locks does not hide the probe');
	isnt(stop_probe($id), '0', 'nor keeps it from being stopped');
}

# ---------------------------------------------------------------------------
# Never in the way
# ---------------------------------------------------------------------------

{
	# the table of the samples is locked: the probe goes on
	my $id = start_probe('SELECT b FROM t WHERE a = 5');
	wait_for_samples($id, 10);
	sql(q{BEGIN; LOCK TABLE risky_migrations.probe_sample; SELECT pg_sleep(2); COMMIT});
	wait_for_samples($id, 200);
	stop_probe($id);
	schedule_is($id, '10 ms', 'samples that cannot be stored are kept, all of them');
	is( sql(qq{
SELECT count(*) FILTER (WHERE latency_ms > 500) < 100, bool_and(outcome = 'ok')
FROM rm_probe_results WHERE probe_id = $id}),
		't|t', 'and the time that the probe itself waits is nobody\'s latency');
}

{
	# neither transaction nor snapshot between two ticks
	my $id = start_probe('SELECT 1', every => "'10 minutes'");
	wait_for_samples($id, 1);
	my $held = 0;
	for (1 .. 50)
	{
		$held += sql(q{
SELECT count(*) FROM pg_stat_activity
WHERE backend_type = 'risky_migrations probe' AND (backend_xmin IS NOT NULL OR xact_start IS NOT NULL)});
	}
	cmp_ok($held, '<', 10, 'a sleeping probe holds no snapshot');
	stop_probe($id);
}

for my $every ("'10 ms'", "'10 minutes'")
{
	my @ids = map { start_probe('SELECT b FROM t WHERE a = 5', every => $every) } 1 .. 3;
	wait_for_samples($_, 1) for @ids;
	my $begin = time;
	sql('DROP EXTENSION risky_migrations CASCADE');
	pass("DROP EXTENSION does not wait for probes (every $every)");
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'risky_migrations probe'},
		'0', 'which end by themselves');
	cmp_ok(time - $begin, '<', 300, 'long before the next tick is due');
	sql('CREATE EXTENSION risky_migrations');
}

{
	# the same id again, while the worker of the former extension lives
	wait_for_samples(start_probe('SELECT 1', every => "'10 minutes'"), 1);
	my $id = sql(q{
SET client_min_messages = warning;
DROP EXTENSION risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
SELECT rm_probe_start('SELECT b FROM t')});
	wait_for_samples($id, 10);
	schedule_is($id, '10 ms', 'a new extension has nothing to do with the old one\'s probes');
	stop_probe($id);
}

for my $drop ('DROP DATABASE other', 'DROP DATABASE other WITH (FORCE)')
{
	sql('CREATE EXTENSION risky_migrations', 'other');
	sql(q{SELECT rm_probe_start('SELECT 1') FROM generate_series(1, 2)}, 'other');
	$node->poll_query_until('other', 'SELECT count(*) > 20 FROM rm_probe_results')
	  or die 'no samples in the other database';
	# it waits for 5 s, then it would fail
	is(sqlstate_of($drop), '', "$drop is not kept up by probes");
	sql('CREATE DATABASE other');
}

# ---------------------------------------------------------------------------
# The server ends
# ---------------------------------------------------------------------------

{
	# catches every cancellation, for as long as it can
	my $stubborn = start_probe(q{DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$});
	my $ordinary = start_probe('SELECT 1');
	wait_for_samples($ordinary, 10);
	is(sqlstate_of("SELECT rm_probe_stop($stubborn)"),
		'55000', 'rm_probe_stop gives up on a query that does not end');
	# pg_ctl would give up
	$node->restart;
	pass('a fast shutdown is not held up by a stubborn query');
	is(sql("SELECT running, end_reason FROM rm_probes WHERE id = $ordinary"),
		'f|terminated', 'at a shutdown a probe stores its end');
	is(workers(), '0', 'and does not come back with the server');
}

{
	my $id = start_probe('SELECT b FROM t WHERE a = 5');
	wait_for_samples($id, 10);
	my $session = session();
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	# samples are committed asynchronously; this commit takes them along
	$session->query_safe('CREATE TABLE synchronous ()');
	kill 'KILL', $pid;
	# as soon as the postmaster knows of its end it takes no sessions
	usleep(1_000) while kill 0, $pid;
	eval { $session->quit };
	for (1 .. 300)
	{
		last if eval { sql('SELECT 1') };
		usleep(100_000);
	}
	is(sql("SELECT running FROM rm_probes WHERE id = $id"),
		'f', 'after a crash of the server a probe is not running');
	is(workers(), '0', 'and has no worker');
	cmp_ok(stop_probe($id), '>=', 10, 'it can be stopped, and has what it had stored');
	is(sql("SELECT end_reason FROM rm_probes WHERE id = $id"), 'stopped',
		'and has ended then');
	$id = start_probe('SELECT 1');
	wait_for_samples($id, 10);
	stop_probe($id);
	pass('others can be started');
}

unlike(slurp_file($node->logfile), qr/TRAP:|PANIC/, 'no assertion has failed');
$node->stop;
done_testing();
