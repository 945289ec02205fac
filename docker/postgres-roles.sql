-- Two roles for the service, besides the superuser that runs this file. It may run any number of times.
--   dfusion_owner   owns the tables and migrates them
--   dfusion         reads and writes rows; cannot change or delete tables
-- psql --dbname "$DATABASE" --file postgres-roles.sql, with both passwords in the environment
\set ON_ERROR_STOP on
\getenv owner_password POSTGRES_OWNER_PASSWORD
\getenv service_password POSTGRES_SERVICE_PASSWORD

SELECT format('CREATE ROLE %I', name) FROM unnest(ARRAY['dfusion_owner', 'dfusion']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE dfusion_owner LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'owner_password';
ALTER ROLE dfusion LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'service_password';

-- 1. the database and its schema
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO dfusion_owner, dfusion', current_database()) \gexec
ALTER SCHEMA public OWNER TO dfusion_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO dfusion;

-- 2. tables of an earlier installation, which the service's role has created
SELECT format('ALTER TABLE %I OWNER TO dfusion_owner', tablename) FROM pg_tables WHERE schemaname = 'public' \gexec

-- 3. rows of present and future tables
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO dfusion;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO dfusion;
ALTER DEFAULT PRIVILEGES FOR ROLE dfusion_owner IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO dfusion;
ALTER DEFAULT PRIVILEGES FOR ROLE dfusion_owner IN SCHEMA public GRANT USAGE ON SEQUENCES TO dfusion;
